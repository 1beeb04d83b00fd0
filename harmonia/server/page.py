"""HTML pages: common header and footer, style, and security headers.

A page loads no other resource; only that of the newest paths reads `/events`. The style sheet and the script are
inline, and the Content-Security-Policy allows them by their hashes (CSP level 3, section 8.4). Therefore a browser runs
no other script, even if one is injected.
"""

import base64
import hashlib
from collections.abc import Container, Generator, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from importlib.resources import files
from typing import Literal
from urllib.parse import quote

from html5tagger import HTML, Builder, Document, E

from harmonia import __version__
from harmonia.nix.store_path import StorePath
from harmonia.server.context import ServerContext
from harmonia.server.http.response import Representation
from harmonia.store.file_reader import ReadOnly


def _static(name: str) -> str:
    return files("harmonia.server").joinpath("static", name).read_text()


_ICON = f"data:image/svg+xml,{quote(_static('icon.svg').strip())}"
_STYLE = _static("style.css").replace('url("ICON")', f'url("{_ICON}")')
_SCRIPTS = {name: _static(f"{name}.js") for name in ("copy", "newest")}


def _allowed(inline: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'"


_POLICY = (
    f"default-src 'none'; style-src {_allowed(_STYLE)}; img-src data:; form-action 'self'; base-uri 'none';"
    " frame-ancestors 'none'"
)
_POLICIES = {name: f"{_POLICY}; script-src {_allowed(script)}" for name, script in _SCRIPTS.items()}
_POLICIES["newest"] += "; connect-src 'self'"  # for /events


@dataclass(frozen=True, slots=True)
class Text(ReadOnly):
    """Bytes in memory, as a body that can be compressed."""

    content: bytes
    sha256: None = None

    @property
    def size(self) -> int:
        return len(self.content)

    def read(self, start: int, stop: int | None) -> Generator[bytes]:
        yield self.content[start:stop]


def begin(context: ServerContext, title: str, top: str, asked: str = "") -> Builder:
    """Return a page with its head and header. The caller adds the content and calls `end`.

    `top` is the relative reference from the page to `/`. `asked` is the text in the search field. All links are
    relative, so that they also work if a proxy serves us below another path.
    """
    page = Document(title, lang="en")
    page.meta(name="viewport", content="width=device-width, initial-scale=1")
    page.link(rel="icon", href=_ICON)
    page.style(HTML(_STYLE))
    with page.header:
        if context.settings.landing:
            page.a("Nix binary cache", href=top)
        if context.settings.browse:
            with page.form(action=f"{top}search", role="search"):
                page.input(
                    type="search", name="q", value=asked, placeholder="Name or hash", aria_label="Search the store"
                )
                page.button("Search")
    return page


def end(context: ServerContext, page: Builder, *, script: Literal["copy", "newest"] | None = None) -> Representation:
    """Finish a page. Return its representation, which clients must revalidate (`no-cache`)."""
    with page.footer:
        page(f"Served by Harmonia {__version__}")
    if script:
        page.script(HTML(_SCRIPTS[script]))
    text = Text(str(page).encode())
    return Representation(
        content_type="text/html; charset=utf-8",
        body=text.content,
        cache_control="no-cache",
        etag=f'"{hashlib.sha256(text.content).hexdigest()[:32]}"',
        zstd=context.encoded(text),
        headers={
            "content-security-policy": _POLICIES[script] if script else _POLICY,
            "x-content-type-options": "nosniff",
        },
    )


def snippet(page: Builder, text: str, caption: str) -> None:
    """Add a caption and a text to copy. `copy.js` adds a button that copies the text."""
    with page.div(class_="snippet"):
        page.p(caption).pre(E.code(text))


def redirect(location: str, status: HTTPStatus, cache_control: str) -> Representation:
    """Return a redirect to `location`, a relative reference: no proxy has to rewrite it (RFC 9110 section 10.2.2)."""
    return Representation(
        content_type="text/plain; charset=utf-8",
        body=f"{status.phrase}\n".encode(),
        cache_control=cache_control,
        status=status,
        headers={"location": location},
    )


def paths(page: Builder, shown: Iterable[StorePath], base: str, unpublished: Container[StorePath] = ()) -> None:
    """Add a list of store paths. Each links to its page below `base`, except the `unpublished` ones."""
    with page.ul(class_="path"):
        for path in shown:
            if path in unpublished:
                page.li(path.name)._(" ").span(path.hash_part, class_="dim")
            else:
                page.li.a(path.name, href=f"{base}{path.hash_part}")._(" ").span(path.hash_part, class_="dim")


def printable(text: bytes) -> str:
    """Return a file name as printable text. Invalid UTF-8 and nonprintable characters are escaped."""
    decoded = text.decode(errors="backslashreplace")
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in decoded)


def count(number: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun in the singular or plural, such as "2 paths"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def size(number: int) -> str:
    """Return a number of bytes with a binary unit, such as "1.5 MiB"."""
    if number < 1024:  # noqa: PLR2004 (the base of binary units)
        return count(number, "byte")
    power = min((number.bit_length() - 1) // 10, 4)
    return f"{number / (1 << 10 * power):,.1f} {' KMGT'[power]}iB"

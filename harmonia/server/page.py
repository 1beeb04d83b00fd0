"""What our pages for people share: their frame, their look, and the headers that keep them harmless.

They load nothing. The one style sheet and the one script are part of the page, and allowed by their hashes (CSP level
3, section 8.4), so that nothing that got into a page by mistake would ever run.
"""

import base64
import hashlib
from collections.abc import Container, Generator, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from importlib.resources import files
from urllib.parse import quote

from html5tagger import HTML, Builder, Document, E

from harmonia import __version__
from harmonia.nix.store_path import StorePath
from harmonia.server.context import ServerContext
from harmonia.server.http.response import Representation


def _static(name: str) -> str:
    return files("harmonia.server").joinpath("static", name).read_text()


_ICON = f"data:image/svg+xml,{quote(_static('icon.svg').strip())}"
_STYLE = _static("style.css").replace('url("ICON")', f'url("{_ICON}")')
_SCRIPT = _static("copy.js")


def _allowed(inline: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'"


_POLICY = (
    f"default-src 'none'; style-src {_allowed(_STYLE)}; img-src data:; form-action 'self'; base-uri 'none';"
    " frame-ancestors 'none'"
)
_POLICY_WITH_SCRIPT = f"{_POLICY}; script-src {_allowed(_SCRIPT)}"


@dataclass(frozen=True, slots=True)
class Text:
    """The bytes of a page, as a body that can be compressed."""

    content: bytes
    sha256: None = None

    @property
    def size(self) -> int:
        return len(self.content)

    def read(self, start: int, stop: int | None) -> Generator[bytes]:
        yield self.content[start:stop]


def begin(context: ServerContext, title: str, top: str, asked: str = "") -> Builder:
    """A page up to its header. `top` leads from its URL to `/`, wherever a proxy has that; `asked` is searched for.

    All links are relative, so that a proxy need not tell us under which path it has put us.
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


def end(context: ServerContext, page: Builder, *, script: bool = False) -> Representation:
    """The page as it is answered: one that shows what may be another any moment."""
    with page.footer:
        page(f"Served by Harmonia {__version__}")
    if script:
        page.script(HTML(_SCRIPT))
    text = Text(str(page).encode())
    return Representation(
        content_type="text/html; charset=utf-8",
        body=text.content,
        cache_control="no-cache",
        etag=f'"{hashlib.sha256(text.content).hexdigest()[:32]}"',
        zstd=context.encoded(text),
        headers={
            "content-security-policy": _POLICY_WITH_SCRIPT if script else _POLICY,
            "x-content-type-options": "nosniff",
        },
    )


def snippet(page: Builder, text: str, caption: str) -> None:
    """Something to copy with one click."""
    with page.div(class_="snippet"):
        page.p(caption).pre(E.code(text))


def redirect(location: str, status: HTTPStatus, cache_control: str) -> Representation:
    """`location` is a relative reference, which a proxy need not rewrite (RFC 9110 section 10.2.2)."""
    return Representation(
        content_type="text/plain; charset=utf-8",
        body=f"{status.phrase}\n".encode(),
        cache_control=cache_control,
        status=status,
        headers={"location": location},
    )


def paths(page: Builder, found: Iterable[StorePath], where: str, kept_back: Container[StorePath] = ()) -> None:
    """A list of store paths, each with its page, `where` these are, but for those that are `kept_back`."""
    with page.ul(class_="path"):
        for path in found:
            if path in kept_back:
                page.li(path.name)._(" ").span(path.hash_part, class_="dim")
            else:
                page.li.a(path.name, href=f"{where}{path.hash_part}")._(" ").span(path.hash_part, class_="dim")


def printable(text: bytes) -> str:
    """A name as it can be shown: bytes that are no UTF-8 and characters that show as nothing are escaped."""
    decoded = text.decode(errors="backslashreplace")
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in decoded)


def count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def size(number: int) -> str:
    """A number of bytes as people read it."""
    if number < 1024:  # noqa: PLR2004 (that is what these units are)
        return count(number, "byte")
    power = min((number.bit_length() - 1) // 10, 4)
    return f"{number / (1 << 10 * power):,.1f} {' KMGT'[power]}iB"

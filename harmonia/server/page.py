"""HTML pages: common header and footer, style, and security headers.

A page loads no other resource; only that of the newest paths reads `/events`. The style sheet and the script are
inline, and the Content-Security-Policy allows them by their hashes (CSP level 3, section 8.4). Therefore a browser runs
no other script, even if one is injected.
"""

import base64
import hashlib
import time
from collections.abc import Container, Generator, Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from importlib.resources import files
from typing import Literal
from urllib.parse import quote

from html5tagger import HTML, Builder, Document, E
from sanic import Request

from harmonia import __version__
from harmonia.nix.store_path import StorePath
from harmonia.server.context import ServerContext
from harmonia.server.http import origin
from harmonia.server.http.response import Representation, etag_of
from harmonia.store.file_reader import ReadOnly


def _static(name: str) -> str:
    return files("harmonia.server").joinpath("static", name).read_text()


ICON = _static("icon.svg").encode()
_ICON = f"data:image/svg+xml,{quote(ICON.strip())}"
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


def of_text(
    context: ServerContext, content_type: str, content: bytes, headers: Mapping[str, str] | None = None
) -> Representation:
    """Return the representation of a text that was made for this request. Clients must revalidate it (`no-cache`)."""
    return Representation(
        content_type=content_type,
        body=content,
        cache_control="no-cache",
        etag=etag_of(content),
        zstd=context.encoded(Text(content)),
        headers=headers or {},
    )


def cache_name(context: ServerContext, request: Request) -> str:
    """Return the name of this cache: `cache_name`, or the host and the path in its URL."""
    return context.settings.cache_name or origin.base_url(request, context.settings).partition("//")[2]


def header_key(context: ServerContext, request: Request) -> tuple[str, bool]:
    """Return a value that is equal for requests whose pages have the same header."""
    return cache_name(context, request), context.may_browse(request)


def begin(context: ServerContext, request: Request, title: str, top: str, asked: str = "") -> Builder:
    """Return a page with its head and header. The caller adds the content and calls `end`.

    `title` is empty for the page at `/`. `top` is the relative reference from the page to `/`. `asked` is the text in
    the search field. All links are relative, so that they also work if a proxy serves us below another path.
    """
    name = cache_name(context, request)
    page = Document(" · ".join(filter(None, (title, name, "Harmonia"))), lang="en")
    page.meta(name="viewport", content="width=device-width, initial-scale=1")
    page.link(rel="icon", href=_ICON)
    page.style(HTML(_STYLE))
    with page.header:
        home = page.a(href=top) if context.settings.landing else page.span
        with home(class_="brand"):
            if title:
                page(name).span("Harmonia", class_="dim")
            else:
                page("Harmonia")
        if context.may_browse(request):
            with page.form(action=f"{top}search", role="search"):
                page.input(
                    type="search", name="q", value=asked, placeholder="Name or hash", aria_label="Search the store"
                )
                page.button("Search")
    return page


def end(context: ServerContext, page: Builder, *, script: Literal["copy", "newest"] | None = None) -> Representation:
    """Finish a page and return its representation."""
    with page.footer:
        page(f"Served by Harmonia {__version__}")
    if script:
        page.script(HTML(_SCRIPTS[script]))
    policy = _POLICIES[script] if script else _POLICY
    headers = {"content-security-policy": policy, "x-content-type-options": "nosniff"}
    return of_text(context, "text/html; charset=utf-8", str(page).encode(), headers)


def snippet(page: Builder, caption: str, text: str, *, line: bool = False) -> None:
    """Add a caption and a text to copy, on one line if it fits. `copy.js` adds a button that copies the text."""
    with page.div(class_="snippet line" if line else "snippet"):
        page.p(caption).pre(E.code(text))


def moment(seconds: float) -> str:
    """Return a time in seconds since 1970 as date and time to the minute, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


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
    with page.ul(class_="path columns"):
        for path in shown:
            if path in unpublished:
                page.li(path.name)._(" ").span(path.hash_part, class_="hash")
            else:
                page.li.a(path.name, href=f"{base}{path.hash_part}")._(" ").span(path.hash_part, class_="hash")


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

"""What our pages for people share: their frame, their look, and the headers that keep them harmless.

They load nothing. The one style sheet and the one script are part of the page, and allowed by their hashes (CSP level
3, section 8.4), so that nothing that got into a page by mistake would ever run.
"""

import base64
import hashlib
from collections.abc import Container, Generator, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import quote

from html5tagger import HTML, Builder, Document, E

from harmonia import __version__
from harmonia.nix.store_path import StorePath
from harmonia.server.context import Cache
from harmonia.server.http.response import Representation

_ICON = "data:image/svg+xml," + quote(
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="-8 -8 16 16" stroke="#5277c3" stroke-width="2">'
    '<path d="M0-7V7M-6-3.5 6 3.5M-6 3.5 6-3.5"/></svg>'
)

_STYLE = """
:root {
  color-scheme: light dark;
  --text: #1b2430; --dim: #566373; --ground: #f6f8fa; --card: #ffffff; --line: #d5dce4; --link: #1a5fb4;
  --code: #eef2f6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --text: #e3e9ef; --dim: #9eabb8; --ground: #12171d; --card: #1a2129; --line: #323d49; --link: #86b9f4;
    --code: #10151b;
  }
}
* { box-sizing: border-box; }
html { font: 1rem/1.55 system-ui, sans-serif; color: var(--text); background: var(--ground); text-size-adjust: 100%; }
body { max-width: 64rem; margin: 0 auto; padding: 0 1rem 3rem; overflow-wrap: anywhere; }
a { color: var(--link); text-underline-offset: .35em; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
header { display: flex; flex-wrap: wrap; gap: .75rem 1.5rem; align-items: center; padding: 1rem 0; }
header > a { display: flex; align-items: center; gap: .6rem; margin-right: auto; }
header > a::before { content: ""; width: 1.4rem; height: 1.4rem; background: url("ICON"); }
header > a { font-weight: 600; color: inherit; text-decoration: none; }
h1 { font-size: 1.75rem; line-height: 1.25; letter-spacing: -.01em; margin: 1.25rem 0 .75rem; }
h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
p { margin: .5rem 0; }
.dim, footer { color: var(--dim); }
section { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
section { padding: 1.1rem; margin: 1rem 0; }
section > :first-child { margin-top: 0; }
section > :last-child { margin-bottom: 0; }
code, pre, .path { font: .8125rem/1.6 ui-monospace, "DejaVu Sans Mono", monospace; }
dd code { word-break: break-all; }
.snippet { display: grid; grid-template-columns: 1fr auto; align-items: center; margin: .75rem 0; }
.snippet { background: var(--code); border: 1px solid var(--line); border-radius: .4rem; }
.snippet p { color: var(--dim); font-size: .8125rem; margin: 0; padding: .45rem .85rem; }
.snippet pre { grid-column: 1 / -1; border-top: 1px solid var(--line); }
.snippet pre { margin: 0; padding: .65rem .85rem; white-space: pre-wrap; line-break: anywhere; }
h1.path { font-size: 1.1rem; letter-spacing: 0; }
form { display: flex; flex: 0 1 26rem; gap: .5rem; }
input, button { font: inherit; color: inherit; border: 1px solid var(--dim); border-radius: .4rem; }
input, button { padding: .35rem .75rem; }
input { flex: 1; min-width: 0; background: var(--card); }
::placeholder { color: var(--dim); opacity: 1; }
button { background: var(--card); cursor: pointer; }
button:hover, nav.actions a:hover { background: var(--code); }
.snippet button { font-size: .8125rem; margin-right: .35rem; padding: .1rem .6rem; }
table { width: 100%; font-size: .9375rem; border-collapse: collapse; }
th, td { text-align: left; vertical-align: baseline; padding: .3rem .75rem .3rem 0; }
th, td { border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
tr:last-child td { border-bottom: 0; }
.size { text-align: right; white-space: nowrap; padding-right: 0; font-variant-numeric: tabular-nums; }
.kind { white-space: nowrap; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.25rem; margin: 0; }
dt { color: var(--dim); }
dd { margin: 0; min-width: 0; }
ul { list-style: none; margin: 0; padding: 0; }
li { padding: .15rem 0; }
nav.actions { display: flex; flex-wrap: wrap; gap: .5rem; margin: 1rem 0; }
nav.actions a { padding: .25rem .8rem; background: var(--card); border: 1px solid var(--line); border-radius: 2rem; }
nav.actions a { text-decoration: none; }
footer { margin-top: 2rem; font-size: .875rem; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
@media (max-width: 34rem) {
  form { flex-basis: 100%; }
  .kind { display: none; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .6rem; }
}
""".replace("ICON", _ICON)

# Without it there is nothing to click in vain. Browsers have a clipboard only for https; for http the old way works.
_SCRIPT = """
for (const snippet of document.querySelectorAll(".snippet")) {
  const [caption, text] = snippet.children;
  const button = document.createElement("button");
  const status = document.createElement("span");
  button.type = "button";
  button.textContent = "Copy";
  button.setAttribute("aria-label", "Copy: " + caption.textContent);
  status.className = "hidden";
  status.setAttribute("role", "status");
  caption.after(button, status);
  button.addEventListener("click", async () => {
    let copied = true;
    try {
      await navigator.clipboard.writeText(text.textContent);
    } catch {
      getSelection().selectAllChildren(text);
      copied = document.execCommand("copy");
    }
    button.textContent = copied ? "Copied" : "Press Ctrl+C";
    status.textContent = button.textContent;
    setTimeout(() => { button.textContent = "Copy"; status.textContent = ""; }, 2000);
  });
}
"""


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


def begin(cache: Cache, title: str, top: str, asked: str = "") -> Builder:
    """A page up to its header. `top` leads from its URL to `/`, wherever a proxy has that; `asked` is searched for.

    All links are relative, so that a proxy need not tell us under which path it has put us.
    """
    page = Document(title, lang="en")
    page.meta(name="viewport", content="width=device-width, initial-scale=1")
    page.link(rel="icon", href=_ICON)
    page.style(HTML(_STYLE))
    with page.header:
        if cache.settings.landing:
            page.a("Nix binary cache", href=top)
        if cache.settings.browse:
            with page.form(action=f"{top}search", role="search"):
                page.input(
                    type="search", name="q", value=asked, placeholder="Name or hash", aria_label="Search the store"
                )
                page.button("Search")
    return page


def end(cache: Cache, page: Builder, *, script: bool = False) -> Representation:
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
        zstd=cache.encoded(text),
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

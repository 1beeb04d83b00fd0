"""The pages in a real browser: headless Chromium, driven by its DevTools protocol."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from websockets.sync.connection import Connection

from harmonia.tools import demo
from harmonia.tools.demo import Demo
from harmonia.tools.fixture_tree import Executable, Symlink, Tree
from harmonia.tools.store_builder import StoreBuilder
from support.browser import CHROMIUM, DESKTOP, PHONE, Page, chromium, open_tab
from support.nginx import nginx
from support.programs import needs
from support.running import Server

pytestmark = [pytest.mark.browser, *([] if CHROMIUM else [needs("chromium")])]

CONTRAST = """(() => {
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if (colour !== "rgba(0, 0, 0, 0)") return colour;
    }
    return "rgb(255, 255, 255)";
  };
  return [...document.querySelectorAll("body *:not(script, style)")].filter((node) => node.innerText)
    .map((node) => [light(getComputedStyle(node).color), light(ground(node))])
    .map(([a, b]) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)).reduce((a, b) => Math.min(a, b));
})()"""
"""The lowest contrast of any text with its background (WCAG 2.1, 1.4.3)."""


UNDERLINES = """[...document.querySelectorAll("main a")].map((link) => {
  const style = getComputedStyle(link);
  const context = document.createElement("canvas").getContext("2d");
  context.font = style.font;
  const underscore = context.measureText("_").actualBoundingBoxDescent;
  return style.textDecorationLine === "none" ? 99 : parseFloat(style.textUnderlineOffset) - underscore;
})"""
"""For each link, the distance in pixels between its underline and the underscores of its font."""


HOLD_TIMERS = "window.held = []; window.setTimeout = (action) => held.push(action); null"
"""Holds the actions of timers: otherwise, a message could vanish on a busy machine before the test sees it."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Connection]:
    with chromium(tmp_path_factory.mktemp("chromium")) as connection:
        yield connection


@pytest.fixture
def page(browser: Connection) -> Iterator[Page]:
    with open_tab(browser) as tab:
        yield tab


ODD_NAMES: Tree = {
    ".hidden": b"hidden\n",
    "100%": b"no escape: %2f\n",
    "__init__.py": b"",
    "a": {"b": {"c": b"sorted before a-b, though / comes after -\n"}},
    "a-b": b"",
    "a.b": Executable(b"#!/bin/sh\necho odd\n"),
    "dangling": Symlink("nowhere"),
    "empty": {},
    "n" * 140: b"a long name\n",
    "question?&hash#<b>": b"not markup\n",
    'quote"\\': b"\n",
    "tab\tand newline\n": b"\n",
    "up": Symlink(".."),
    "with space": b"\n",
    "Ünïcödé-☃": b"\n",
}
"""Names that need escaping in URLs and pages."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    directory = str(tmp_path_factory.mktemp("browser") / "demo")
    manual = demo.make(directory).paths["hello-manual-2.13.0"]
    store = StoreBuilder(directory)
    store.add_source("odd-names", ODD_NAMES)
    store.add_source("latest-manual", Symlink(f"/nix/store/{manual}"), [manual])
    return demo.make(directory)  # keeps the store, including the added paths


@pytest.fixture(scope="module")
def modern_site(made: Demo) -> str:
    """Return the hash part of a site as sites are built today: modules, data that scripts load, fonts."""
    script = (
        b"import { name } from './part.js';\n"
        b"const { greeting } = await (await fetch('data.json')).json();\n"
        b"document.querySelector('p').textContent = greeting + name;\n"
        b"try { localStorage.x = 1; document.title = 'has storage'; } catch { document.title = 'sandboxed'; }\n"
    )
    tree: Tree = {
        "index.html": b"<!DOCTYPE html><title>x</title><p></p><script type=module src=app.js></script>",
        "app.js": script,
        "part.js": b"export const name = 'store';\n",
        "data.json": b'{"greeting": "from the "}',
    }
    return StoreBuilder(made.directory).add_source("modern-site", tree).path.hash_part


@pytest.fixture(scope="module")
def server(made: Demo, modern_site: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:  # noqa: ARG001 (needs the site)
    settings = f"browse = true\nsign_key_paths = ['{made.directory}/secret-key']"
    running = Server(tmp_path_factory.mktemp("browser-server") / "running", Path(made.directory), settings)
    running.start()
    yield running
    assert running.stop() == 0


@pytest.fixture
def urls(server: Server, made: Demo) -> dict[str, str]:
    hashes = {name: path.hash_part for name, path in made.paths.items()}
    return {
        "landing": f"{server.url}/",
        "search": f"{server.url}/search?q=hello",
        "path": f"{server.url}/path/{hashes['hello-2.13.0']}",
        "listing": f"{server.url}/serve/{hashes['odd-names']}/",
        "error": f"{server.url}/path/{'0' * 32}",
    }


@pytest.mark.parametrize("which", ["landing", "search", "path", "listing"])
def test_page_loads_without_errors_and_without_other_requests(page: Page, urls: dict[str, str], which: str) -> None:
    page.open(urls[which])
    assert page.errors == []
    assert [url for url in page.requested if not url.startswith("data:")] == [urls[which]]
    assert page.run("document.querySelectorAll('h1').length") == 1
    assert page.run("document.documentElement.lang") == "en"
    assert page.run("getComputedStyle(document.querySelector('section')).borderRadius") != "0px"


@pytest.mark.parametrize("which", ["landing", "search", "path", "listing", "error"])
def test_page_is_readable_in_light_and_dark_on_desktop_and_phone(page: Page, urls: dict[str, str], which: str) -> None:
    page.open(urls[which])
    grounds = set()
    for scheme in ("light", "dark"):
        for size in (DESKTOP, PHONE):
            page.set_view(size, scheme)
            grounds.add(page.run("getComputedStyle(document.documentElement).backgroundColor"))
            assert page.run(CONTRAST) >= 4.5
            assert page.run("document.documentElement.scrollWidth") <= size[0]
            if directory := os.environ.get("SCREENSHOTS"):
                page.screenshot(f"{directory}/{which}-{scheme}-{size[0]}.png")
    assert len(grounds) == 2


@pytest.mark.parametrize("which", ["search", "path", "listing"])
def test_underlines_of_links_leave_underscores_visible(page: Page, urls: dict[str, str], which: str) -> None:
    page.open(urls[which])
    distances = page.run(UNDERLINES)
    assert distances
    assert min(distances) > 0


def test_copy_button_copies_the_snippet(page: Page, urls: dict[str, str], server: Server, made: Demo) -> None:
    page.open(urls["landing"])
    may = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"], "browserContextId": page.context}
    page.call("Browser.grantPermissions", origin=server.url, **may)
    page.run(HOLD_TIMERS)
    page.click(".snippet button")
    page.wait("document.querySelector('.snippet button').textContent === 'Copied'")
    assert page.run("document.querySelector('.snippet [role=status]').textContent") == "Copied"
    assert page.run("navigator.clipboard.readText()") == server.url
    page.click("section button")
    page.wait("document.querySelector('section button').textContent === 'Copied'")
    copied = page.run("navigator.clipboard.readText()")
    assert copied == f"extra-substituters = {server.url}\nextra-trusted-public-keys = {made.public_key}"
    page.run("held.forEach((action) => action())")
    assert page.run("document.querySelector('.snippet button').textContent") == "Copy"


def test_copy_button_works_without_the_clipboard_api_over_http(
    page: Page, urls: dict[str, str], server: Server
) -> None:
    page.call(
        "Page.addScriptToEvaluateOnNewDocument",
        source="Object.defineProperty(navigator, 'clipboard', {value: undefined});"
        "document.addEventListener('copy', () => { window.copied = getSelection().toString(); });",
    )
    page.open(urls["landing"]).run(HOLD_TIMERS)
    page.click(".snippet button")
    page.wait("document.querySelector('.snippet button').textContent === 'Copied'")
    assert page.run("window.copied") == server.url


def test_without_scripts_there_is_no_copy_button(page: Page, urls: dict[str, str]) -> None:
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    page.open(urls["landing"])
    document = page.call("DOM.getDocument")["root"]["nodeId"]
    assert page.call("DOM.querySelectorAll", nodeId=document, selector=".snippet button")["nodeIds"] == []


def test_links_lead_from_the_search_to_a_file_and_back(page: Page, urls: dict[str, str], server: Server) -> None:
    page.open(urls["landing"])
    page.events.clear()
    page.run("document.querySelector('input').value = 'hello-2.13'; document.querySelector('form').requestSubmit()")
    page.loaded()
    for selector, title in (
        ("tbody tr:nth-child(1) a", "hello-2.13.0 · "),
        ("nav a", "hello-2.13.0 · "),
        ("tr:nth-child(2) a", "bin · "),
        ("header a", ""),
    ):
        page.events.clear()
        page.click(selector)
        page.loaded()
        assert page.run("document.title") == f"{title}{server.url.removeprefix('http://')} · Harmonia"
        assert page.errors == []
    assert page.run("location.pathname") == "/"


def test_all_links_work_below_a_path_of_a_proxy(
    page: Page, start: Callable[..., Server], made: Demo, tmp_path: Path
) -> None:
    server = start(store=Path(made.directory), settings="browse = true\ntrusted_proxies = ['127.0.0.1']")
    hello, manual = made.paths["hello-2.13.0"], made.paths["latest-manual"]
    headers = "proxy_set_header Host $http_host; proxy_set_header X-Forwarded-Prefix /a/cache;"
    with nginx(tmp_path / "nginx", f"location /a/cache/ {{ proxy_pass {server.url}/; {headers} }}") as (url, _):
        base = f"{url}/a/cache"
        name = f"{base.removeprefix('http://')} · Harmonia"
        asked = page.open(f"{base}/").requested
        assert page.run("document.querySelector('.snippet code').textContent") == base
        for text, title in (("hello", f"hello · {name}"), (hello.hash_part, f"{hello.name} · {name}")):
            page.events.clear()
            page.run(
                f"document.querySelector('input').value = '{text}'; document.querySelector('form').requestSubmit()"
            )
            page.loaded()
            assert page.run("document.title") == title
            asked += page.requested
        assert base in page.run("document.querySelector('.snippet:not(.line) code').textContent").split()
        for selector, title in (
            ("nav a", f"{hello.name} · "),
            ("tr:nth-child(2) a", "bin · "),
            ("h1 a", f"{hello.name} · "),
            ("nav a", f"{hello.name} · "),
            ("header a", ""),
        ):
            page.events.clear()
            page.click(selector)
            page.loaded()
            assert page.run("document.title") == title + name
            assert page.errors == []
            asked += page.requested
        asked += page.open(f"{base}/serve/{manual.hash_part}").requested
        assert page.run("getComputedStyle(document.body).maxWidth") == "640px"
    assert [each for each in asked if not each.startswith((f"{base}/", "data:"))] == []


def test_newest_paths_appear_and_vanish_without_a_reload(
    page: Page, start: Callable[..., Server], tmp_path: Path
) -> None:
    store = StoreBuilder(tmp_path / "store")
    old = store.add_text("old-1.0", b"old")
    server = start(store=tmp_path / "store", settings="browse = true")
    page.open(f"{server.url}/search")
    names = "[...document.querySelectorAll('#newest a')].map((link) => link.textContent)"
    assert page.run(names) == ["old-1.0"]
    page.wait("document.querySelector('#live').textContent")
    new = store.add(store.output_path("new-2.0"), b"x" * 3_000_000)
    store.add_text("new.drv", b"")
    page.wait(f"{names}.length === 2")
    assert page.run(names) == ["new-2.0", "old-1.0"]
    cells = page.run("[...document.querySelectorAll('#newest td')].slice(0, 2).map((cell) => cell.textContent)")
    assert cells == [f"new-2.0 {new.path.hash_part}", "2.9 MiB"]
    with store.connect() as connection:
        connection.execute("delete from ValidPaths where path = ?", (f"/nix/store/{old.path}",))
    page.wait(f"{names}.length === 1")
    for scheme in ("light", "dark"):
        for size in (DESKTOP, PHONE):
            page.set_view(size, scheme)
            assert page.run(CONTRAST) >= 4.5
            assert page.run("document.documentElement.scrollWidth") <= size[0]
            if directory := os.environ.get("SCREENSHOTS"):
                page.screenshot(f"{directory}/newest-{scheme}-{size[0]}.png")
    assert page.errors == []
    reloaded = page.run("document.querySelector('#newest').innerText")
    page.open(f"{server.url}/search")
    assert page.run("document.querySelector('#newest').innerText") == reloaded
    assert page.run("document.querySelector('#newest a').href") == f"{server.url}/path/{new.path.hash_part}"


def test_path_does_not_need_itself(page: Page, urls: dict[str, str]) -> None:
    page.open(urls["path"])  # of hello, which refers to itself and to its library
    assert "This path needs 1 path." in page.run("document.querySelector('main').innerText")
    links = page.run("[...document.querySelectorAll('.columns a')].map((link) => link.innerText)")
    assert links == ["libgreet-1.3.0", "demo-environment"]


def test_error_page_links_to_the_landing_page_and_the_search(page: Page, urls: dict[str, str], server: Server) -> None:
    page.open(urls["error"])
    assert page.run("document.querySelector('h1').innerText") == "Not Found"
    assert page.run("document.querySelector('header a').href") == f"{server.url}/"
    assert page.run("document.querySelector('form').action") == f"{server.url}/search"
    links = page.run("[...document.querySelectorAll('main a')].map((link) => link.href)")
    assert links[:2] == [f"{server.url}/", f"{server.url}/search"]


def test_build_log_is_displayed_instead_of_downloaded(page: Page, urls: dict[str, str]) -> None:
    page.open(urls["path"])
    page.events.clear()
    page.click("nav a:last-child")
    page.loaded()
    assert page.run("document.contentType") == "text/plain"
    assert page.run("document.body.innerText").startswith("installing hello-2.13.0 as /nix/store/")
    assert page.errors == []


def test_website_in_the_store_works(page: Page, server: Server, made: Demo) -> None:
    page.open(f"{server.url}/serve/{made.paths['latest-manual'].hash_part}")
    assert page.run("document.title") == "The manual of hello"
    assert page.run("getComputedStyle(document.body).maxWidth") == "640px"
    page.events.clear()
    page.click("a")
    page.loaded()
    assert page.run("document.title") == "Options of hello"
    assert page.run("getComputedStyle(document.body).maxWidth") == "640px"
    assert page.errors == []


def test_modern_website_is_sandboxed_from_the_cache(page: Page, server: Server, modern_site: str) -> None:
    page.open(f"{server.url}/serve/{modern_site}/")
    page.wait("document.title !== 'x'")
    assert page.run("document.querySelector('p').textContent") == "from the store"
    assert page.errors == []
    assert page.run("document.title") == "sandboxed"
    assert page.run("self.origin") == "null"
    reading = "fetch('../../search?q=hello').then(() => 'read', () => 'refused')"
    assert page.run(reading) == "refused"


EVIL = [
    "<script>window.ran = 1</script>",
    "\"><img src=x onerror='window.ran = 1'>",
    "'><svg onload='window.ran = 1'>",
    "</title></textarea></style><script>window.ran = 1</script>",
    "javascript:window.ran = 1",
    "&lt;script&gt;window.ran = 1&lt;script&gt;",
]


class Hostile:
    """A server with a store in which every name and text tries to run a script."""

    def __init__(self, directory: Path) -> None:
        store = StoreBuilder(directory / "store")
        files = {text.replace("/", "\N{FRACTION SLASH}").encode() + b"%2f": b"" for text in EVIL}
        links = {f"link-{number}": Symlink(text) for number, text in enumerate(EVIL)}
        page = "".join(EVIL).encode()
        derivation, output = store.add_derivation("evil", "/bin/sh")
        self.path = store.add(output, {**files, **links, "dir": files, "text": page}, deriver=derivation.path)
        store.add_log(derivation.path, page)
        with store.connect() as connection:
            connection.execute(
                "update ValidPaths set sigs = ?", (" ".join(EVIL),)
            )  # with such a ca, the row would be invalid
        settings = "browse = true\ntrusted_proxies = ['127.0.0.1']"
        self.server = Server(directory / "server", directory / "store", settings)
        self.server.start()
        hash_part = self.path.path.hash_part
        inner = [f"/serve/{hash_part}/", f"/serve/{hash_part}/dir/", f"/serve/{hash_part}/text"]
        self.pages = ["/", f"/path/{hash_part}", f"/log/{derivation.path}", f"/{hash_part}.narinfo", *inner]
        self.pages += [f"{where}{quote(text, safe='')}" for text in EVIL for where in ("/search?q=", "/none/", "/log/")]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hostile]:
    made = Hostile(tmp_path_factory.mktemp("hostile"))
    yield made
    assert made.server.stop() == 0


@pytest.mark.parametrize("forwarded", [None, *EVIL])
def test_foreign_text_never_becomes_markup(page: Page, hostile: Hostile, forwarded: str | None) -> None:
    pages = hostile.pages if forwarded is None else hostile.pages[:2]
    if forwarded is not None:
        names = ("X-Forwarded-Host", "X-Forwarded-Proto", "X-Forwarded-Prefix", "X-Forwarded-For", "User-Agent")
        page.call("Network.setExtraHTTPHeaders", headers=dict.fromkeys(names, forwarded))
    for path in pages:
        page.open(hostile.server.url + path)
        assert page.run("window.ran") is None, path
        # Escaping prevents it, not the Content-Security-Policy.
        assert not [each for each in page.errors if "Content Security Policy" in str(each)], path
        assert page.run("document.querySelectorAll('img, svg, iframe, [onerror], [onload]').length") == 0, path
        assert page.run("[...document.links].every((link) => /^https?:$/.test(link.protocol))"), path
        scripts = page.run("[...document.scripts].map((script) => script.textContent)")
        assert not [script for script in scripts if "window.ran" in script], path
    listing = f"{hostile.server.url}/serve/{hostile.path.path.hash_part}/"
    assert "onerror" in page.open(listing).run("document.body.innerText")  # shown as text

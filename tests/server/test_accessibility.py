"""axe-core finds no barrier on any page: light and dark, on a desktop and a phone; and all works by keyboard."""

import json
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from harmonia.tools import demo
from harmonia.tools.demo import Demo
from harmonia.tools.store_builder import StoreBuilder
from support.browser import CHROMIUM, DESKTOP, PHONE, Page, chromium, open_tab
from support.programs import needs
from support.running import Server

_AXE = find_spec("axe_playwright_python")

pytestmark = [
    pytest.mark.browser,
    *([] if CHROMIUM else [needs("chromium")]),
    pytest.mark.skipif(_AXE is None, reason="no axe-core here: pip install --no-deps axe-playwright-python"),
]

NONE = "0" * 32


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("chromium")) as connection, open_tab(connection) as tab:
        yield tab


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    directory = str(tmp_path_factory.mktemp("axe") / "demo")
    demo.make(directory)
    builder = StoreBuilder(directory)
    long_line = b"x = 1\n" + b"#" * 1000 + b"\n"
    builder.add_source("source", {"dir": {}, "long.py": long_line, "empty": b""})
    for number in range(120):
        builder.add_text(f"many-{number}", b"")
    return demo.make(directory)


@pytest.fixture(scope="module")
def servers(made: Demo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """Start a server that signs, and one that does not."""
    directory = tmp_path_factory.mktemp("axe-server")
    signs = f"browse = true\ncache_name = 'Example cache'\nsign_key_paths = ['{made.directory}/secret-key']"
    running = {
        name: Server(directory / name, Path(made.directory), settings)
        for name, settings in (("signs", signs), ("plain", "browse = true"))
    }
    for server in running.values():
        server.start()
    yield running
    for server in running.values():
        assert server.stop() == 0


PAGES = {
    "landing": "/",
    "unsigned": "/",
    "newest": "/search",
    "search": "/search?q=hello",
    "pages": "/search?q=many&page=2",
    "nothing": "/search?q=nothing-like-it",
    "compare": "/search?q=hello&compare={hello-2.12.1}",
    "path": "/path/{demo-environment}",
    "diff": "/diff/{hello-2.12.1}/{hello-2.13.0}",
    "why": "/explain/{hello-2.13.0}",
    "why not": f"/explain/{NONE}",
    "directory": "/serve/{source}/",
    "text": "/serve/{source}/long.py?view",
    "empty": "/serve/{source}/empty?view",
    "missing": f"/path/{NONE}",
}


def url_of(which: str, servers: dict[str, Server], made: Demo) -> str:
    hashes = {name: path.hash_part for name, path in made.paths.items()}
    path = PAGES[which]
    for name, hash_part in hashes.items():
        path = path.replace(f"{{{name}}}", hash_part)
    assert "{" not in path
    return servers["plain" if which == "unsigned" else "signs"].url + path


def axe_source() -> str:
    """Return the script of axe-core, without a value."""
    assert _AXE is not None
    assert _AXE.origin is not None
    return Path(_AXE.origin).with_name("axe.min.js").read_text() + "; null"


@pytest.mark.parametrize("which", PAGES)
def test_axe_finds_no_violation(page: Page, servers: dict[str, Server], made: Demo, which: str) -> None:
    page.open(url_of(which, servers, made))
    page.run(axe_source())
    for scheme in ("light", "dark"):
        for size in (DESKTOP, PHONE):
            page.set_view(size, scheme)
            if pictures := os.environ.get("SCREENSHOTS"):
                page.screenshot(f"{pictures}/{which}-{scheme}-{size[0]}.png")
            found = json.loads(page.run("axe.run().then((result) => JSON.stringify(result))"))
            broken = [(each["id"], [node["html"] for node in each["nodes"]]) for each in found["violations"]]
            assert broken == [], (scheme, size)
            assert len(found["passes"]) > 10
            assert page.run("document.documentElement.scrollWidth") <= size[0]


def press(page: Page, key: str, code: int) -> None:
    for kind in ("rawKeyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)


def test_landing_page_fits_on_one_screen(page: Page, servers: dict[str, Server], made: Demo) -> None:
    page.open(url_of("landing", servers, made))
    page.set_view(DESKTOP)
    assert page.run("document.documentElement.scrollHeight") <= DESKTOP[1]


def test_axe_reports_a_barrier(page: Page, servers: dict[str, Server], made: Demo) -> None:
    page.open(url_of("landing", servers, made))
    page.run(
        "document.querySelector('input[type=search]').removeAttribute('aria-label');"
        " document.querySelector('input[type=search]').removeAttribute('placeholder')"
    )
    page.run(axe_source())
    found = page.run("axe.run().then((result) => result.violations.map((each) => each.id))")
    assert "label" in found


def test_tabs_of_the_landing_page_switch_by_keyboard_and_without_scripts(
    page: Page, servers: dict[str, Server], made: Demo
) -> None:
    page.set_view(DESKTOP)
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    page.open(url_of("landing", servers, made))
    page.call("Emulation.setScriptExecutionDisabled", value=False)  # for `run`; the page's own script has not run
    visible = (
        "[...document.querySelectorAll('.tabs > div')].filter((panel) => panel.offsetHeight).map((p) => p.className)"
    )
    assert page.run(visible) == ["panel-0"]
    page.run("document.querySelector('input[type=search]').focus()")
    for _ in range(2):  # the button, and the tabs
        press(page, "Tab", 9)
    assert page.run("document.activeElement.id") == "tab-0"
    for number in (1, 2, 3, 0):
        press(page, "ArrowRight", 39)
        assert page.run("document.activeElement.id") == f"tab-{number}"
        assert page.run(visible) == [f"panel-{number}"]
        assert page.run("getComputedStyle(document.activeElement.nextElementSibling).outlineStyle") == "solid"


@pytest.mark.parametrize("which", ["landing", "search", "path", "directory", "text", "missing"])
def test_every_link_and_button_is_reached_by_keyboard_with_a_visible_focus(
    page: Page, servers: dict[str, Server], made: Demo, which: str
) -> None:
    page.set_view(DESKTOP)
    page.open(url_of(which, servers, made))
    wanted = page.run(
        "[...document.querySelectorAll('a, button, input[type=search]')].filter((node) => node.offsetParent).length"
    )
    focused = []
    for _ in range(wanted + 10):
        press(page, "Tab", 9)
        focused.append(
            page.run(
                "(() => { const node = document.activeElement; if (node === document.body) return null;"
                " const all = [...document.querySelectorAll('*')];"
                " const shown = node.type === 'radio' ? node.nextElementSibling : node;"
                " return [all.indexOf(node), node.matches('a, button, input[type=search]'),"
                " getComputedStyle(shown).outlineStyle]; })()"
            )
        )
        if focused[-1] is None:
            break
    reached = [each for each in focused if each is not None]
    assert all(outline != "none" for _, _, outline in reached)
    assert len({place for place, is_target, _ in reached if is_target}) == wanted
    assert [place for place, _, _ in reached] == sorted(place for place, _, _ in reached)  # in the order of reading

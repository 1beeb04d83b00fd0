"""`/serve/…?view` shows a text of the store in our own style, and never as markup."""

import html
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urljoin

import pytest

from harmonia.server.resources import text_file
from harmonia.tools.fixture_tree import Executable, Symlink, Tree
from harmonia.tools.store_builder import StoreBuilder
from support.running import FROZEN_RATES, Answer, Server, patched

Start = Callable[..., Server]

EVIL = b"</code></pre></section><script>alert(1)</script>\n<img src=x onerror=alert(1)>\n&lt;b&gt;\n"
TREE: Tree = {
    "bin": {"run": Executable(b"#!/bin/sh\n\texit\n")},
    "evil": EVIL,
    "evil.html": EVIL,
    "evil.svg": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
    "binary": b"text\0",
    "latin-1": b"caf\xe9\n",
    "hidden": "a\x1b[31m\u202eb\x0c\r\nc\r\n".encode(),
    "late-nul": b"x" * 100_000 + b"\0\xff",
    "long": b"line\n" * (text_file._MAX_LINES + 5),  # noqa: SLF001 (a bound is tested)
    "large": b"x" * 100 + b"\n" + b"y" * text_file._MAX_BYTES,  # noqa: SLF001
    "empty": b"",
    "data.json": b'{"a": 1}',
    "link": Symlink("bin/run"),
    "dir": {},
}


@pytest.fixture
def base(store: StoreBuilder) -> str:
    return f"/serve/{store.add_source('texts', TREE).path.hash_part}/"


def shown(answer: Answer) -> str:
    """Return the text that the page shows."""
    match = re.search(r"<pre tabindex=0[^>]*><code>(.*?)</code>", answer.text, re.DOTALL)
    assert match
    return html.unescape(match[1])


def test_text_is_shown_with_line_numbers_and_a_link_to_the_file(start: Start, tmp_path: Path, base: str) -> None:
    server = start(store=tmp_path / "store", settings="browse = true")
    for name in ("bin/run", "link"):
        answer = server.get(f"{base}{name}?view")
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert shown(answer) == "#!/bin/sh\n\texit"
        assert re.findall('<span id="?L([0-9]+)"?>', answer.text) == ["1", "2"]
        [raw] = re.findall(r'<a href="(./[^"]+)">Raw', answer.text)
        assert server.get(urljoin(f"{base}{name}", raw)).body == b"#!/bin/sh\n\texit\n"
    page = server.get(f"{base}bin/run?view").text
    links = re.findall(r"<h1.*?</h1>", page)[0]
    assert [urljoin(f"{base}bin/run", href) for href in re.findall(r'href="([^"]+)"', links)] == [base, f"{base}bin/"]
    assert server.get(f"{base}data.json?view").status == 200
    assert shown(server.get(f"{base}empty?view")) == ""
    listing = server.get(base).text
    assert 'href="./evil?view"' in listing
    assert 'href="./evil.html"' in listing


def test_markup_in_a_text_stays_text(start: Start, tmp_path: Path, base: str) -> None:
    answer = start(store=tmp_path / "store").get(f"{base}evil?view")
    assert shown(answer) == EVIL.decode().removesuffix("\n")
    assert "<script" not in answer.text
    assert "<img" not in answer.text
    assert "script-src" not in answer.headers["content-security-policy"]


@pytest.mark.parametrize("name", ["evil.html", "evil.svg", "binary", "latin-1"])
def test_what_is_not_a_text_redirects_to_the_sandboxed_file(start: Start, tmp_path: Path, base: str, name: str) -> None:
    server = start(store=tmp_path / "store")
    answer = server.get(f"{base}{name}?view")
    assert (answer.status, answer.headers["location"]) == (303, f"./{name}")
    raw = server.get(f"{base}{name}")
    assert raw.status == 200
    assert raw.headers["content-security-policy"].startswith("sandbox")


def test_characters_that_hide_the_content_are_escaped(start: Start, tmp_path: Path, base: str) -> None:
    server = start(store=tmp_path / "store")
    assert shown(server.get(f"{base}hidden?view")) == "a\\x1b[31m\\u202eb\\x0c\nc"
    assert shown(server.get(f"{base}late-nul?view")).endswith("x\\x00\N{REPLACEMENT CHARACTER}")


def test_page_is_bounded_and_says_so(start: Start, tmp_path: Path, base: str) -> None:
    server = start(store=tmp_path / "store")
    answer = server.get(f"{base}long?view")
    assert shown(answer).count("\n") == text_file._MAX_LINES - 1  # noqa: SLF001 (a bound is tested)
    assert "only the first 10,000 lines are shown" in answer.text
    large = server.get(f"{base}large?view")
    assert len(shown(large)) == text_file._MAX_BYTES  # noqa: SLF001
    assert "only the first 2 lines are shown" in large.text


def test_directory_is_no_text(start: Start, tmp_path: Path, base: str) -> None:
    server = start(store=tmp_path / "store")
    assert server.get(f"{base}dir?view").status == 301
    assert server.get(f"{base}dir/?view").status == 200
    assert server.get(f"{base}none?view").status == 404


def test_text_pages_count_towards_the_query_rate(start: Start, tmp_path: Path, base: str) -> None:
    server = start(store=tmp_path / "store", settings="max_query_rate = 2", program=patched(FROZEN_RATES))
    assert [server.get(f"{base}evil?view").status for _ in range(3)] == [200, 200, 429]
    assert server.get(f"{base}evil").status == 200


def test_single_file_of_a_store_path_is_shown(store: StoreBuilder, start: Start, tmp_path: Path) -> None:
    hash_part = store.add_source("script.sh", b"echo\n").path.hash_part
    server = start(store=tmp_path / "store")
    answer = server.get(f"/serve/{hash_part}?view")
    assert shown(answer) == "echo"
    [raw] = re.findall(r'<a href="(./[^"]+)">Raw', answer.text)
    assert server.get(urljoin(f"/serve/{hash_part}", raw)).body == b"echo\n"

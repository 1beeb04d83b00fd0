"""`/search` without a query shows the newest published paths, also without JavaScript."""

import re
from collections.abc import Callable
from pathlib import Path

from harmonia.tools.store_builder import StoreBuilder
from support.running import Server

Start = Callable[..., Server]


def names(server: Server) -> list[str]:
    return re.findall(r'<td class=path><a href="path/\w{32}">(.*?)</a>', server.get("/search").text)


def test_newest_paths_come_first_without_derivations(store: StoreBuilder, start: Start, tmp_path: Path) -> None:
    for number in range(60):
        store.add_text(f"text-{number}", b"")
    store.add_text("text.drv", b"")
    server = start(store=tmp_path / "store", settings="browse = true")
    assert names(server) == [f"text-{number}" for number in range(59, 9, -1)]


def test_private_paths_are_not_among_the_newest(store: StoreBuilder, start: Start, tmp_path: Path) -> None:
    store.add_text("public", b"")
    store.add_text("secret", b"")
    server = start(store=tmp_path / "store", settings="browse = true\npublish.deny = ['secret']")
    assert names(server) == ["public"]


def test_page_of_an_empty_store_has_an_empty_table(store: StoreBuilder, start: Start, tmp_path: Path) -> None:  # noqa: ARG001 (needs the store)
    server = start(store=tmp_path / "store", settings="browse = true")
    assert names(server) == []
    assert server.get("/search").status == 200


def test_only_this_page_may_connect_and_only_to_its_own_server(
    store: StoreBuilder, start: Start, tmp_path: Path
) -> None:
    store.add_text("text", b"")
    server = start(store=tmp_path / "store", settings="browse = true")
    policy = server.get("/search").headers["content-security-policy"]
    assert "connect-src 'self'" in policy
    assert "unsafe" not in policy
    assert "connect-src" not in server.get("/search?q=text").headers["content-security-policy"]

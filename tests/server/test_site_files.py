"""`/robots.txt` keeps crawlers from the store, and `/favicon.ico` is the icon. Neither needs a token."""

from collections.abc import Callable
from pathlib import Path
from urllib.robotparser import RobotFileParser

from harmonia.config.tokens import new
from harmonia.tools.store_builder import StoreBuilder
from support.running import Server

Start = Callable[..., Server]


def test_crawlers_may_not_fetch_the_store(store: StoreBuilder, start: Start, tmp_path: Path) -> None:
    info = store.add_source("app-1.0", b"")
    server = start(store=tmp_path / "store", settings="browse = true")
    answer = server.get("/robots.txt")
    assert (answer.status, answer.headers["content-type"]) == (200, "text/plain; charset=utf-8")
    rules = RobotFileParser()
    rules.parse(answer.text.splitlines())
    hash_part = info.path.hash_part
    for path in (f"/path/{hash_part}", f"/nar/{hash_part}.nar", f"/serve/{hash_part}/", "/search", "/metrics"):
        assert not rules.can_fetch("Crawler", f"http://cache{path}")
    assert "Allow: /$" in answer.text  # an extension of RFC 9309 that Python's parser does not know


def test_icon_is_a_picture(server: Server) -> None:
    answer = server.get("/favicon.ico")
    assert (answer.status, answer.headers["content-type"]) == (200, "image/svg+xml")
    assert answer.text.startswith("<svg ")


def test_neither_needs_a_token(store: StoreBuilder, start: Start, tmp_path: Path) -> None:  # noqa: ARG001 (needs the store)
    (tmp_path / "tokens").write_text(f"{new('reader', ['read'])[1]}\n")
    server = start(store=tmp_path / "store", settings=f"tokens_path = '{tmp_path}/tokens'")
    assert [server.get(path).status for path in ("/robots.txt", "/favicon.ico", "/")] == [200, 200, 401]

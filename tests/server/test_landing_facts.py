"""`/` shows facts about the cache, but only those that the client may also learn elsewhere."""

import html
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from harmonia.config.tokens import new
from harmonia.tools.store_builder import StoreBuilder
from support.running import Server, wait_until

Start = Callable[..., Server]


def facts(server: Server, headers: dict[str, str] | None = None) -> dict[str, str]:
    """Return the facts by their terms, without markup."""
    page = server.get("/", headers or {}).text
    rows = re.findall(r"<dt>(.*?)<dd>(.*?)</div>", page, re.DOTALL)
    return {term: html.unescape(re.sub("<.*?>", " ", value)).strip() for term, value in rows}


def test_page_shows_size_newest_path_cache_and_start(store: StoreBuilder, start: Start, tmp_path: Path) -> None:
    infos = [store.add_source("first-1.0", bytes(100_000)), store.add_source("second-2.0", bytes(3_000_000))]
    store.add_text("third.drv", b"")
    server = start(store=tmp_path / "store", settings="browse = true\ncache_size = '100M'")
    shown = facts(server)
    assert shown["Paths"] == "3"
    assert shown["Size"] == "3.0 MiB"
    assert shown["Newest path"].startswith("second-2.0")
    assert f'href="path/{infos[1].path.hash_part}"' in server.get("/").text
    assert shown["Compressed NARs"] == "0 bytes of 100.0 MiB"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", shown["Up since"])
    assert "Upstreams" not in shown


def test_without_browse_the_store_is_known_only_as_far_as_the_metrics_show_it(
    store: StoreBuilder, start: Start, tmp_path: Path
) -> None:
    store.add_text("secret", b"")
    assert facts(start(store=tmp_path / "store")).keys() == {"Paths", "Size", "Compressed NARs", "Up since"}
    for settings in ("metrics = false", "metrics_bind = '127.0.0.1:0'"):
        assert facts(start(store=tmp_path / "store", settings=settings)) == {}


def test_without_metrics_only_a_browser_of_all_paths_learns_their_size(
    store: StoreBuilder, start: Start, tmp_path: Path
) -> None:
    store.add_text("secret", b"")
    store.add_text("public", b"")
    store.add_text("private", b"")
    settings = "browse = true\nmetrics = false\n"
    assert facts(start(store=tmp_path / "store", settings=settings)).keys() == {"Paths", "Size", "Newest path"}
    hidden = facts(start(store=tmp_path / "store", settings=settings + "publish.deny = ['secret', 'private']"))
    assert hidden.keys() == {"Newest path"}
    assert hidden["Newest path"].startswith("public")


@pytest.mark.parametrize("anonymous", ["", "read"])
def test_facts_follow_the_scopes_of_the_token(
    store: StoreBuilder, start: Start, tmp_path: Path, anonymous: str
) -> None:
    store.add_text("text", b"")
    scopes = {"reader": ["read"], "person": ["read", "browse"], "monitor": ["read", "metrics"]}
    tokens = {name: new(name, granted) for name, granted in scopes.items()}
    tokens["expired"] = new("expired", ["read", "browse", "metrics"], expires_at=1.0)
    file = tmp_path / "tokens"
    file.write_text("".join(f"{token}\n" for _, token in tokens.values()))
    settings = f"browse = true\ntokens_path = '{file}'\nanonymous_scopes = {[anonymous] if anonymous else []}"
    server = start(store=tmp_path / "store", settings=settings)

    def seen(name: str) -> set[str]:
        return set(facts(server, {"Authorization": f"Bearer {tokens[name][0]}"}))

    assert seen("reader") == set()
    assert seen("person") == {"Paths", "Size", "Newest path"}
    assert seen("monitor") == {"Paths", "Size", "Compressed NARs", "Up since"}
    assert ("role=search" in server.get("/", {"Authorization": f"Bearer {tokens['person'][0]}"}).text) is True
    assert ("role=search" in server.get("/", {"Authorization": f"Bearer {tokens['reader'][0]}"}).text) is False
    if anonymous:
        assert facts(server) == {}
        assert facts(server, {"Authorization": "Bearer harmonia_wrong"}) == {}
        assert seen("expired") == set()


def test_upstreams_are_counted(store: StoreBuilder, start: Start, tmp_path: Path) -> None:  # noqa: ARG001 (needs the store)
    other = start(store=tmp_path / "store")
    settings = f"[[upstream]]\nurl = '{other.url}'\n[[upstream]]\nurl = 'http://127.0.0.1:1'"
    server = start(store=tmp_path / "store", settings=settings)
    wait_until(lambda: facts(server)["Upstreams"] == "1 of 2 up")
    assert "127.0.0.1:1" not in server.get("/").text


def test_page_is_served_while_the_database_is_missing(store: StoreBuilder, start: Start, tmp_path: Path) -> None:
    server = start(store=tmp_path / "store", settings="browse = true")
    Path(store.db_path).unlink()
    assert server.get("/").status == 200
    assert facts(server).keys() == {"Compressed NARs", "Up since"}


def test_name_and_description_of_the_settings_are_shown_as_text(
    store: StoreBuilder, start: Start, tmp_path: Path
) -> None:
    info = store.add_source("app-1.0", b"")
    name, sentence = "<b>Team & cache</b>", "Builds of <i>the team</i>, for x86_64-linux."
    settings = f"browse = true\ncache_name = '{name}'\ncache_description = '{sentence}'"
    server = start(store=tmp_path / "store", settings=settings)
    page = server.get("/").text
    assert f"<h1>{html.escape(name, quote=False).replace('&gt;', '>')}</h1>" in page
    assert sentence.replace("<", "&lt;") in page
    for path, title in (("/", ""), (f"/path/{info.path.hash_part}", "app-1.0 · "), ("/search?q=app", "app · ")):
        found = re.findall("<title>(.*?)</title>", server.get(path).text)
        assert [html.unescape(each) for each in found] == [f"{title}{name} · Harmonia"]

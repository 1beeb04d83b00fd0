"""`/explain/<hash>` gives the reason why a path is served or not, and shows nothing that the publish policy hides."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin

from harmonia.config.tokens import new
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey
from harmonia.tools.fixture_tree import remove_tree
from harmonia.tools.store_builder import StoreBuilder
from support.running import Server

Start = Callable[..., Server]

BROWSE = "browse = true\n"
KEY = SecretKey.generate("stored-1")


def explained(server: Server, hash_part: str, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
    answer = server.get(f"/explain/{hash_part}?json", dict(headers or {}))
    assert answer.status == 200
    assert answer.headers["cache-control"] == "no-store"
    value: dict[str, Any] = json.loads(answer.text)
    return value


def codes(value: dict[str, Any]) -> list[str]:
    return [reason["code"] for reason in value["reasons"]]


def signed(store: StoreBuilder, name: str, references: list[PathInfo] | None = None) -> PathInfo:
    path = store.output_path(name)
    return store.add(path, b"", references=[each.path for each in references or []], keys=[KEY])


def test_served_path_is_explained_in_text_and_json(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    hash_part = signed(store, "served").path.hash_part
    server = start(store=tmp_path / "store", settings=BROWSE)
    value = explained(server, hash_part)
    assert codes(value) == ["valid", "signed"]
    assert value["available"]
    text = server.get(f"/explain/{hash_part}").text
    assert text.startswith("yes: this server has the path\n\n- /nix/store/")
    assert "signed by stored-1" in text


ABSENT = "0" * 32
HTML = {"Accept": "text/html,*/*;q=0.8"}


def test_browsers_get_a_page_with_the_remedy(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    served = signed(store, "served").path.hash_part
    unsigned = store.add(store.output_path("unsigned"), b"").path.hash_part
    server = start(store=tmp_path / "store", settings=BROWSE)
    answer = server.get(f"/explain/{unsigned}", HTML)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    assert "<h1>Not available</h1><p class=lead>No key has signed it, so clients refuse it." in answer.text
    assert "Remedy: create a key with `harmonia keygen NAME`" in answer.text
    assert f'href="../path/{unsigned}"' in answer.text
    page = server.get(f"/explain/{served}", HTML).text
    assert "<h1>Available</h1><p class=lead>This server has the path.<" in page


def test_pages_of_a_path_and_of_a_missing_one_link_to_the_reason(
    start: Start, store: StoreBuilder, tmp_path: Path
) -> None:
    served = signed(store, "served").path.hash_part
    server = start(store=tmp_path / "store", settings=BROWSE)
    closed = start(store=tmp_path / "store")
    assert f'href="../explain/{served}"' in server.get(f"/path/{served}", HTML).text
    for url in (f"/path/{ABSENT}", f"/{ABSENT}.narinfo", f"/{ABSENT}.ls", f"/serve/{ABSENT}"):
        answer = server.get(url, HTML)
        assert answer.status == 404
        [link] = re.findall(rf'href="([./]*explain/{ABSENT})"', answer.text)
        assert urljoin(url, link) == f"/explain/{ABSENT}"
        assert "explain" not in closed.get(url, HTML).text
    assert "explain" not in server.get("/other", HTML).text
    search = f"/search?q={quote(f'/nix/store/{ABSENT}-app')}"
    assert f'href="explain/{ABSENT}"' in server.get(search, HTML).text


def test_cause_of_each_fault_is_named(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    unsigned = store.add(store.output_path("unsigned"), b"")
    gone = signed(store, "gone")
    broken = signed(store, "broken", [gone])
    remove_tree(store.real_path(gone.path))
    failed, output = store.add_derivation("failed", "/bin/sh")
    store.add_log(failed.path, b"error")
    _, other = store.add_derivation("other", "/bin/sh")
    server = start(store=tmp_path / "store", settings=BROWSE)
    for hash_part, code in {
        unsigned.path.hash_part: "not_signed",
        gone.path.hash_part: "files_missing",
        broken.path.hash_part: "closure_incomplete",
        output.hash_part: "built_before",
        other.hash_part: "not_built",
        "0" * 32: "not_valid",
    }.items():
        value = explained(server, hash_part)
        [decisive] = [reason for reason in value["reasons"] if reason["decides"]]
        assert decisive["code"] == code
        assert decisive["remedy"]
        assert value["summary"] == decisive["text"]
        assert not value["available"]


def test_rule_that_hides_a_path_is_named_only_to_a_token(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    hidden = signed(store, "hidden").path.hash_part
    secret, token = new("ops", ("read", "browse"))
    (tmp_path / "tokens").write_text(f"{token}\n")
    rules = '[publish]\ndeny = ["hid*"]'
    public = start(store=tmp_path / "store", settings=f"{BROWSE}{rules}")
    assert codes(explained(public, hidden)) == codes(explained(public, "0" * 32)) == ["not_valid"]
    private = start(
        store=tmp_path / "store",
        settings=f"{BROWSE}tokens_path = '{tmp_path}/tokens'\nanonymous_scopes = ['read']\n{rules}",
    )
    assert private.get(f"/explain/{hidden}").status == 401
    value = explained(private, hidden, {"Authorization": f"Bearer {secret}"})
    assert codes(value) == ["valid", "not_published", "signed"]
    assert "publish.deny" in value["summary"]


def test_paths_that_only_a_hidden_path_needs_are_not_named(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    below = signed(store, "secret-below")
    app = signed(store, "app", [signed(store, "secret-library", [below])])
    server = start(store=tmp_path / "store", settings=f'{BROWSE}[publish]\ndeny = ["secret-*"]')
    assert codes(explained(server, app.path.hash_part)) == ["valid", "signed"]
    assert "secret" not in server.get(f"/explain/{app.path.hash_part}").text


def test_upstreams_are_shown_only_to_a_token_if_the_server_has_tokens(start: Start, tmp_path: Path) -> None:
    StoreBuilder(tmp_path / "store")
    secret, token = new("ops", ("read", "browse"))
    (tmp_path / "tokens").write_text(f"{token}\n")
    upstream = "[[upstream]]\nurl = 'http://127.0.0.1:1'\n"
    for anonymous in ("[]", "['browse']"):
        settings = f"{BROWSE}tokens_path = '{tmp_path}/tokens'\nanonymous_scopes = {anonymous}\n{upstream}"
        server = start(store=tmp_path / "store", settings=settings)
        value = explained(server, "0" * 32, {"Authorization": f"Bearer {secret}"})
        assert ("upstream_lacks" in codes(value)) == (anonymous == "[]")


def test_each_upstream_is_asked_for_a_missing_path(start: Start, tmp_path: Path) -> None:
    StoreBuilder(tmp_path / "store")
    remote = StoreBuilder(tmp_path / "remote")
    path = signed(remote, "remote").path.hash_part
    upstream = start(store=tmp_path / "remote")
    dead = "http://127.0.0.1:1"
    other = SecretKey.generate("other-1").public_key
    near = f"[[upstream]]\nurl = '{upstream.url}'\npublic_keys = ['{KEY.public_key}']\n"
    strict = f"[[upstream]]\nurl = '{upstream.url}/'\npublic_keys = ['{other}']\n"
    far = f"[[upstream]]\nurl = '{dead}'\n"
    patient = f"{BROWSE}upstream_timeout = 60.0\n"
    value = explained(start(store=tmp_path / "store", settings=f"{patient}{near}{far}"), path)
    assert codes(value) == ["not_valid", "upstream_has", "upstream_lacks"]
    assert value["available"]
    assert value["reasons"][-1]["text"].startswith(f"the upstream {dead} gives no usable answer: ")
    assert value["reasons"][-1]["text"].count(dead) == 1
    assert value["summary"] == f"the upstream {upstream.url} has it, signed by stored-1"
    refused = explained(start(store=tmp_path / "store", settings=f"{patient}{strict}"), path)
    assert not refused["available"]
    assert "no signature by any of public_keys" in refused["reasons"][1]["text"]


def test_nothing_is_explained_without_browse(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    hash_part = signed(store, "served").path.hash_part
    assert start(store=tmp_path / "store").get(f"/explain/{hash_part}").status == 404

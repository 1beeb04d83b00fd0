"""`/<hash>.narinfo`: exact bytes, all signatures, never outdated."""

import json
import os
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from harmonia.cache.zstd import Encoding
from harmonia.config.tables.zstd import Zstd
from harmonia.nix import base32
from harmonia.nix.signing import SecretKey
from harmonia.tools.store_builder import StoreBuilder
from support.running import Server, patched
from support.shared_store import info

Start = Callable[..., Server]


def test_narinfo_is_exact(server: Server, shared_store: StoreBuilder, keys: list[SecretKey]) -> None:
    tree = info(shared_store, "tree")
    nar_hash = base32.encode(tree.nar_hash)
    signatures = sorted([*tree.sigs, *(key.sign(tree.fingerprint("/nix/store")) for key in keys)])
    answer = server.get(f"/{tree.path.hash_part}.narinfo")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/x-nix-narinfo"
    assert answer.headers["cache-control"] == "public, max-age=86400"
    assert answer.text == (
        f"StorePath: /nix/store/{tree.path}\n"
        f"URL: nar/{tree.path.hash_part}-{nar_hash}-{Encoding.of(Zstd()).name}.nar.zst\n"
        "Compression: zstd\n"
        f"NarHash: sha256:{nar_hash}\n"
        f"NarSize: {tree.nar_size}\n"
        f"References: {' '.join(tree.references)}\n"
        f"Deriver: {tree.deriver}\n" + "".join(f"Sig: {signature}\n" for signature in signatures)
    )


def test_narinfo_without_compression_is_exact(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    path = store.add_source("path", b"contents")
    server = start(store=tmp_path / "store", settings="nar_compression = 'none'")
    nar_hash = base32.encode(path.nar_hash)
    assert server.get(f"/{path.path.hash_part}.narinfo").text == (
        f"StorePath: /nix/store/{path.path}\n"
        f"URL: nar/{path.path.hash_part}-{nar_hash}.nar\n"
        "Compression: none\n"
        f"FileHash: sha256:{nar_hash}\n"
        f"FileSize: {path.nar_size}\n"
        f"NarHash: sha256:{nar_hash}\n"
        f"NarSize: {path.nar_size}\n"
        "References: \n"
        f"CA: {path.ca}\n"
    )


@pytest.mark.parametrize("query", ["json", "json=1", "json=&x"])
def test_json_has_the_same_values_as_the_text(server: Server, shared_store: StoreBuilder, query: str) -> None:
    path = info(shared_store, "tree")
    text = server.get(f"/{path.path.hash_part}.narinfo")
    answer = server.get(f"/{path.path.hash_part}.narinfo?{query}")
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert answer.headers["cache-control"] == text.headers["cache-control"]
    assert answer.headers["etag"] != text.headers["etag"]
    rendered = json.loads(answer.body)
    assert (rendered["version"], rendered["path"], rendered["narSize"]) == (3, path.path, path.nar_size)
    assert f"\nURL: {rendered['url']}\n" in text.text
    for sig in rendered["signatures"]:
        assert f"\nSig: {sig['keyName']}:{sig['sig']}\n" in text.text


def test_malformed_content_address_gets_404_and_is_logged(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    """Nix would fail to parse a narinfo with it."""
    path = store.add_source("path", b"contents")
    with store.connect() as connection:
        connection.execute("update ValidPaths set ca = 'fixed:nonsense'")
    server = start(store=tmp_path / "store")
    for query in ("", "?json"):
        assert server.get(f"/{path.path.hash_part}.narinfo{query}").status == 404
        assert server.wait_for_log(
            r"ERROR .*cannot use the database's row for .*-path': malformed content address 'fixed:nonsense'"
        )


def test_narinfo_has_content_address_and_empty_references(server: Server, shared_store: StoreBuilder) -> None:
    dep = info(shared_store, "dep")
    text = server.get(f"/{dep.path.hash_part}.narinfo").text
    assert "\nReferences: \n" in text
    assert text.endswith(f"CA: {dep.ca}\n")
    assert "Deriver" not in text


def test_every_key_signs(server: Server, shared_store: StoreBuilder, keys: list[SecretKey]) -> None:
    tree = info(shared_store, "tree")
    text = server.get(f"/{tree.path.hash_part}.narinfo").text
    signatures = [line.removeprefix("Sig: ") for line in text.splitlines() if line.startswith("Sig: ")]
    for key in keys:
        assert sum(key.public_key.verify(tree.fingerprint("/nix/store"), signature) for signature in signatures) == 1


@pytest.mark.parametrize(
    "hash_part", ["0" * 32, "z" * 32, "0" * 31, "0" * 33, "e" * 32, "%2e" * 32, "A" * 32], ids=lambda text: text[:4]
)
def test_unknown_or_malformed_hash_part_gets_404(server: Server, hash_part: str) -> None:
    answer = server.get(f"/{hash_part}.narinfo")
    assert (answer.status, answer.body) == (404, b"Not Found\n")
    assert answer.headers["cache-control"] == "no-store"


def test_if_none_match_gets_304(server: Server, shared_store: StoreBuilder) -> None:
    url = f"/{info(shared_store, 'tree').path.hash_part}.narinfo"
    whole = server.get(url)
    for condition in (whole.headers["etag"], "*", f'"other", W/{whole.headers["etag"]}'):
        answer = server.get(url, {"If-None-Match": condition})
        assert (answer.status, answer.body) == (304, b"")
        assert answer.headers["etag"] == whole.headers["etag"]
        assert answer.headers["cache-control"] == whole.headers["cache-control"]
    assert server.get(url, {"If-None-Match": '"other"'}).body == whole.body


def test_new_path_new_signature_and_deletion_take_effect_at_once(
    start: Start, store: StoreBuilder, tmp_path: Path
) -> None:
    store.add_source("first", b"first")
    server = start(store=tmp_path / "store")
    path = store.output_path("late")
    url = f"/{path.hash_part}.narinfo"
    assert server.get(url).status == 404
    store.add(path, b"contents")
    assert server.get(url).status == 200
    signature = SecretKey.generate("late-1").sign(b"")
    with store.connect() as connection:
        connection.execute("update ValidPaths set sigs = ? where path = ?", (signature, f"/nix/store/{path}"))
    assert f"Sig: {signature}\n" in server.get(url).text
    store.delete(path)
    assert server.get(url).status == 404
    assert server.head(url).status == 404


def test_narinfo_is_unchanged_after_unrelated_additions(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    path = store.add_source("path", b"contents").path
    server = start(store=tmp_path / "store")
    before = server.get(f"/{path.hash_part}.narinfo")
    store.add_source("other", b"other")
    assert server.get(f"/{path.hash_part}.narinfo") == before


def test_malformed_stored_signatures_are_omitted(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    good = SecretKey.generate("good-1").sign(b"")
    path = store.output_path("signed")
    store.add(path, b"contents", sigs=["no-colon", "short:AAAA", "bad:%%%", good])
    server = start(store=tmp_path / "store")
    text = server.get(f"/{path.hash_part}.narinfo").text
    assert [line for line in text.splitlines() if line.startswith("Sig:")] == [f"Sig: {good}"]
    assert server.wait_for_log(r"WARNING .*signed.*no-colon")


@pytest.mark.parametrize("column", ["narSize = null", "narSize = 0", "hash = 'sha256:none'", "hash = 'md5:00'"])
def test_unusable_database_row_gets_404_and_is_logged(
    start: Start, store: StoreBuilder, tmp_path: Path, column: str
) -> None:
    path = store.add_source("odd", b"contents").path
    with store.connect() as connection:
        connection.execute(f"update ValidPaths set {column}")
    server = start(store=tmp_path / "store")
    assert server.get(f"/{path.hash_part}.narinfo").status == 404
    assert server.wait_for_log(rf"ERROR .*{path}")


@pytest.mark.slow
def test_locked_database_gets_503(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    path = store.add_source("path", b"contents").path
    with sqlite3.connect(store.db_path) as connection:
        connection.execute("pragma journal_mode = delete")
    connection.close()
    server = start(store=tmp_path / "store")
    locking = sqlite3.connect(store.db_path, isolation_level=None)
    locking.execute("begin exclusive")
    for url in (f"/{path.hash_part}.narinfo", f"/{'0' * 32}.narinfo", "/health"):
        answer = server.get(url)
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    locking.execute("rollback")
    locking.close()
    assert server.get(f"/{path.hash_part}.narinfo").status == 200
    assert server.get("/health").status == 200


def test_missing_database_gets_503_until_restored(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    path = store.add_source("path", b"contents").path
    server = start(store=tmp_path / "store")
    url = f"/{path.hash_part}.narinfo"
    assert server.get(url).status == 200
    database = Path(store.db_path)
    database.rename(tmp_path / "away")
    assert server.get(url).status == 503
    assert server.get("/health").status == 503
    (tmp_path / "away").rename(database)
    assert server.get(url).status == 200


def test_concurrent_requests_to_a_locked_database_wait_no_longer_than_one(
    start: Start, store: StoreBuilder, tmp_path: Path
) -> None:
    store.add_source("path", b"contents")
    with sqlite3.connect(store.db_path) as connection:
        connection.execute("pragma journal_mode = delete")
    connection.close()
    logged = patched(
        "import sys\nfrom harmonia.store.store import Store\nlook_up = Store.path_info\n"
        "Store.path_info = lambda *of: (print('a lookup begins', file=sys.stderr, flush=True), look_up(*of))[1]"
    )
    server = start(store=tmp_path / "store", program=logged)
    locking = sqlite3.connect(store.db_path, isolation_level=None)
    locking.execute("begin exclusive")
    with server.connect() as one, server.connect() as two, server.connect() as three, server.connect() as four:
        (worker,) = server.workers
        os.kill(worker, signal.SIGSTOP)  # until all have been sent: each request waits for a time of its own
        for number, connection_ in enumerate((one, two, three, four)):
            connection_.sendall(f"GET /{str(number) * 32}.narinfo HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        os.kill(worker, signal.SIGCONT)
        for connection_ in (one, two, three, four):
            assert connection_.recv(100).startswith(b"HTTP/1.1 503 ")
        assert (
            sum("a lookup begins" in line for line in server.log) < 4
        )  # some requests gave up before their lookup began
        # Requests without a lookup are answered meanwhile.
        assert server.get("/version").status == 200
    locking.close()


def test_priority_and_narinfo_max_age_are_used(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    path = store.add_source("path", b"contents").path
    server = start(store=tmp_path / "store", settings="priority = 7\nnarinfo_max_age = 60")
    assert server.get("/nix-cache-info").text.startswith("StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 7\n")
    assert server.get(f"/{path.hash_part}.narinfo").headers["cache-control"] == "public, max-age=60"


def test_virtual_nix_store_is_used(start: Start, tmp_path: Path) -> None:
    store = StoreBuilder(tmp_path / "store", store_dir="/custom/store")
    path = store.add_source("path", b"contents").path
    server = start(store=tmp_path / "store", settings="virtual_nix_store = '/custom/store'")
    assert server.get("/nix-cache-info").text.startswith("StoreDir: /custom/store\n")
    assert server.get(f"/{path.hash_part}.narinfo").text.startswith(f"StorePath: /custom/store/{path}\n")


def test_etag_changes_with_the_content(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    path = store.add_source("path", b"contents").path
    server = start(store=tmp_path / "store")
    first = server.get(f"/{path.hash_part}.narinfo")
    with store.connect() as connection:
        connection.execute("update ValidPaths set sigs = ?", (SecretKey.generate("k").sign(b""),))
    second = server.get(f"/{path.hash_part}.narinfo")
    assert first.body != second.body
    assert first.headers["etag"] != second.headers["etag"]

"""`/realisations/…` and `/build-trace-v2/…`: what content-addressed derivations came out as, signed."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from harmonia.nix.signing import PublicKey, SecretKey
from harmonia.nix.store_path import StorePath
from harmonia.tools.store_builder import StoreBuilder
from support.realisations import BUILD_TRACE, HASH, OTHER, REALISATIONS, create, register, trace
from support.running import Server

Start = Callable[..., Server]

DRV, OTHER_DRV = f"{'1' * 32}-x.drv", f"{'2' * 32}-x.drv"
OLD = f"/realisations/{HASH}!out.doi"


def signed(value: Any) -> bytes:
    """The text that Nix signs of a JSON value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


@pytest.fixture
def key() -> SecretKey:
    return SecretKey.generate("own-1")


@pytest.fixture
def serve(start: Start, store: StoreBuilder, key: SecretKey, tmp_path: Path) -> Callable[[], Server]:
    (tmp_path / "key").write_text(key.export())
    (tmp_path / "key").chmod(0o600)
    return lambda: start(store=Path(store.real_dir).parents[1], settings=f"sign_key_paths = ['{tmp_path}/key']")


@pytest.fixture
def path(store: StoreBuilder) -> StorePath:
    return store.add_source("output", b"contents").path


def verified(public_key: PublicKey, sigs: Sequence[str], *values: Any) -> list[bool]:
    """Whether each value is signed by one of the signatures."""
    return [any(public_key.verify(signed(value), sig) for sig in sigs) for value in values]


def test_a_realisation(serve: Callable[[], Server], store: StoreBuilder, path: StorePath, key: SecretKey) -> None:
    create(store, REALISATIONS)
    value = {"dependentRealisations": {}, "id": f"{HASH}!out", "outPath": path}
    stored = SecretKey.generate("stored-1").sign(signed(value))
    register(store, HASH, "out", path, stored)
    answer = serve().get(OLD)
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "public, max-age=86400"
    assert answer.body == signed(value | {"signatures": sorted([stored, key.sign(signed(value))])})


def test_what_a_realisation_depends_on(
    serve: Callable[[], Server], store: StoreBuilder, path: StorePath, key: SecretKey
) -> None:
    """Nix up to 2.26, at least, wants all of it signed, 2.34 all but what it depends on."""
    create(store, REALISATIONS)
    others = [store.add_source(name, name.encode()).path for name in ("one", "two")]
    register(store, HASH, "out", path)
    for name, other in zip(("bin", "out"), others, strict=True):
        register(store, OTHER, name, other)
    with store.connect() as connection:
        connection.execute("insert into RealisationsRefs values (1, 2), (1, 3), (1, null)")
    told = json.loads(serve().get(OLD).body)
    sigs = told.pop("signatures")
    whole = {
        "dependentRealisations": {f"{OTHER}!bin": others[0], f"{OTHER}!out": others[1]},
        "id": f"{HASH}!out",
        "outPath": path,
    }
    assert told == whole
    assert len(sigs) == 2
    assert verified(key.public_key, sigs, whole, whole | {"dependentRealisations": {}}) == [True, True]


def test_the_build_trace(serve: Callable[[], Server], store: StoreBuilder, path: StorePath, key: SecretKey) -> None:
    create(store, BUILD_TRACE)
    derivation = f"{store.output_path('top').hash_part}-c++-1.0.drv"
    fingerprint = signed({"key": {"drvPath": derivation, "outputName": "out"}, "value": {"outPath": path}})
    signer = SecretKey.generate("stored-1")
    trace(store, derivation, "out", path, signer.sign(fingerprint))
    server = serve()
    sigs = [{"keyName": each.name, "sig": each.sign(fingerprint).partition(":")[2]} for each in (key, signer)]
    for spelling in (derivation, derivation.replace("+", "%2B")):
        answer = server.get(f"/build-trace-v2/{spelling}/out.doi")
        assert (answer.status, answer.body) == (200, signed({"outPath": path, "signatures": sigs}))
        assert answer.headers["content-type"] == "application/json"


def test_each_kind_is_served_from_its_own_table(
    serve: Callable[[], Server], store: StoreBuilder, path: StorePath
) -> None:
    """Whichever of them are there, and as soon as they are there."""
    new = f"/build-trace-v2/{DRV}/out.doi"
    server = serve()
    assert [server.get(where).status for where in (OLD, new)] == [404, 404]
    create(store, REALISATIONS)
    assert [server.get(where).status for where in (OLD, new)] == [404, 404]
    register(store, HASH, "out", path)
    assert [server.get(where).status for where in (OLD, new)] == [200, 404]
    create(store, BUILD_TRACE)
    trace(store, DRV, "out", path)
    assert [server.get(where).status for where in (OLD, new)] == [200, 200]
    create(store, "drop table RealisationsRefs; drop table Realisations;")
    assert [server.get(where).status for where in (OLD, new)] == [404, 200]
    store.delete(path)
    assert [server.get(where).status for where in (OLD, new)] == [404, 404]


def test_both_spellings(serve: Callable[[], Server], store: StoreBuilder, path: StorePath) -> None:
    create(store, REALISATIONS)
    register(store, HASH, "out", path)
    register(store, HASH, "a+b", path)
    server = serve()
    assert server.get(OLD.replace("!", "%21")).body == server.get(OLD).body
    other = OLD.replace("out", "a+b")
    assert server.get(other.replace("!", "%21").replace("+", "%2B")).body == server.get(other).body
    assert json.loads(server.get(other).body)["id"] == f"{HASH}!a+b"


def test_new_signatures_are_seen_at_once(serve: Callable[[], Server], store: StoreBuilder, path: StorePath) -> None:
    create(store, REALISATIONS)
    register(store, HASH, "out", path)
    server = serve()
    answer = server.get(OLD)
    assert server.get(OLD, {"If-None-Match": answer.headers["etag"]}).status == 304
    sig = SecretKey.generate("late-1").sign(b"")
    with store.connect() as connection:
        connection.execute("update Realisations set signatures = ?", (sig,))
    answer = server.get(OLD, {"If-None-Match": answer.headers["etag"]})
    assert sig in json.loads(answer.body)["signatures"]


def test_malformed_signatures_are_left_out(serve: Callable[[], Server], store: StoreBuilder, path: StorePath) -> None:
    create(store, REALISATIONS)
    good = SecretKey.generate("good-1").sign(b"")
    register(store, HASH, "out", path, f"no-colon short-1:AAAA {good}")
    server = serve()
    sigs = json.loads(server.get(OLD).body)["signatures"]
    assert [sig.partition(":")[0] for sig in sigs] == ["good-1", "own-1"]
    assert server.wait_for_log("skipping a stored signature: 'short-1:AAAA' is malformed")


@pytest.mark.parametrize(
    "where",
    [
        "/realisations/",
        "/realisations/.doi",
        "/realisations/!.doi",
        f"/realisations/{HASH}!out",
        f"/realisations/{HASH}!bin.doi",
        f"/realisations/{OTHER}!out.doi",
        f"/realisations/{HASH}.doi",
        f"/realisations/{HASH}%2521out.doi",
        f"/realisations/{HASH}!out%00.doi",
        f"/realisations/{HASH}!out.doi/",
        "/realisations/%80.doi",
        "/realisations/' or 1=1!out.doi".replace(" ", "%20"),
        f"/build-trace-v2/{DRV}",
        f"/build-trace-v2/{DRV}/",
        f"/build-trace-v2/{DRV}/out",
        f"/build-trace-v2/{OTHER_DRV}/out.doi",
        f"/build-trace-v2/{DRV}/bin.doi",
        "/build-trace-v2/%80/out.doi",
        f"/build-trace-v2/{DRV}%2fout.doi",
    ],
)
def test_what_we_do_not_have_is_404(server: Server, traced: None, where: str) -> None:  # noqa: ARG001 (fills the store)
    assert server.get(where).status == 404


@pytest.fixture(scope="module")
def traced(shared_store: StoreBuilder) -> None:
    path = shared_store.add_source("traced", b"traced").path
    create(shared_store, REALISATIONS + BUILD_TRACE)
    register(shared_store, HASH, "out", path)
    trace(shared_store, DRV, "out", path)


def test_what_is_in_no_store_is_404(serve: Callable[[], Server], store: StoreBuilder, path: StorePath) -> None:
    create(store, BUILD_TRACE)
    trace(store, DRV, "out", path)
    with store.connect() as connection:
        connection.execute("update BuildTraceV3 set outputPath = ?", ("/nix/store/nonsense",))
        connection.execute("update ValidPaths set path = ?", ("/nix/store/nonsense",))
    server = serve()
    assert server.get(f"/build-trace-v2/{DRV}/out.doi").status == 404
    assert server.wait_for_log(f"cannot use the database's row for {DRV}!out")

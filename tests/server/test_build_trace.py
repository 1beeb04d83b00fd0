"""`/realisations/…` and `/build-trace-v2/…`: signed outputs of content-addressed derivations."""

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
    """Return the text of a JSON value that Nix signs."""
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
    """Return, for each value, True if one of the signatures signs it."""
    return [any(public_key.verify(signed(value), sig) for sig in sigs) for value in values]


def test_realisation_is_served_with_stored_and_own_signatures(
    serve: Callable[[], Server], store: StoreBuilder, path: StorePath, key: SecretKey
) -> None:
    create(store, REALISATIONS)
    value = {"dependentRealisations": {}, "id": f"{HASH}!out", "outPath": path}
    stored = SecretKey.generate("stored-1").sign(signed(value))
    register(store, HASH, "out", path, stored)
    answer = serve().get(OLD)
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "public, max-age=86400"
    assert answer.body == signed(value | {"signatures": sorted([stored, key.sign(signed(value))])})


def test_realisation_with_dependencies_is_signed_for_old_and_new_nix(
    serve: Callable[[], Server], store: StoreBuilder, path: StorePath, key: SecretKey
) -> None:
    """Nix 2.26 and older verify the signature of the whole, Nix 2.34 that of everything except the dependencies."""
    create(store, REALISATIONS)
    others = [store.add_source(name, name.encode()).path for name in ("one", "two")]
    register(store, HASH, "out", path)
    for name, other in zip(("bin", "out"), others, strict=True):
        register(store, OTHER, name, other)
    with store.connect() as connection:
        connection.execute("insert into RealisationsRefs values (1, 2), (1, 3), (1, null)")
    served = json.loads(serve().get(OLD).body)
    sigs = served.pop("signatures")
    whole = {
        "dependentRealisations": {f"{OTHER}!bin": others[0], f"{OTHER}!out": others[1]},
        "id": f"{HASH}!out",
        "outPath": path,
    }
    assert served == whole
    assert len(sigs) == 2
    assert verified(key.public_key, sigs, whole, whole | {"dependentRealisations": {}}) == [True, True]


def test_build_trace_entry_is_served_with_stored_and_own_signatures(
    serve: Callable[[], Server], store: StoreBuilder, path: StorePath, key: SecretKey
) -> None:
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


def test_each_format_is_served_from_its_own_table(
    serve: Callable[[], Server], store: StoreBuilder, path: StorePath
) -> None:
    """Either table may be missing, and may appear while the server runs."""
    new = f"/build-trace-v2/{DRV}/out.doi"
    server = serve()
    assert [server.get(path).status for path in (OLD, new)] == [404, 404]
    create(store, REALISATIONS)
    assert [server.get(path).status for path in (OLD, new)] == [404, 404]
    register(store, HASH, "out", path)
    assert [server.get(path).status for path in (OLD, new)] == [200, 404]
    create(store, BUILD_TRACE)
    trace(store, DRV, "out", path)
    assert [server.get(path).status for path in (OLD, new)] == [200, 200]
    create(store, "drop table RealisationsRefs; drop table Realisations;")
    assert [server.get(path).status for path in (OLD, new)] == [404, 200]
    store.delete(path)
    assert [server.get(path).status for path in (OLD, new)] == [404, 404]


def test_percent_encoded_and_plain_ids_get_the_same_response(
    serve: Callable[[], Server], store: StoreBuilder, path: StorePath
) -> None:
    create(store, REALISATIONS)
    register(store, HASH, "out", path)
    register(store, HASH, "a+b", path)
    server = serve()
    assert server.get(OLD.replace("!", "%21")).body == server.get(OLD).body
    other = OLD.replace("out", "a+b")
    assert server.get(other.replace("!", "%21").replace("+", "%2B")).body == server.get(other).body
    assert json.loads(server.get(other).body)["id"] == f"{HASH}!a+b"


def test_new_signature_in_the_database_changes_response_and_etag(
    serve: Callable[[], Server], store: StoreBuilder, path: StorePath
) -> None:
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


def test_malformed_stored_signatures_are_omitted(
    serve: Callable[[], Server], store: StoreBuilder, path: StorePath
) -> None:
    create(store, REALISATIONS)
    good = SecretKey.generate("good-1").sign(b"")
    register(store, HASH, "out", path, f"no-colon short-1:AAAA {good}")
    server = serve()
    sigs = json.loads(server.get(OLD).body)["signatures"]
    assert [sig.partition(":")[0] for sig in sigs] == ["good-1", "own-1"]
    assert server.wait_for_log("skipping a stored signature: 'short-1:AAAA' is malformed")


@pytest.mark.parametrize(
    "path",
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
def test_unknown_or_malformed_id_gets_404(server: Server, traced: None, path: str) -> None:  # noqa: ARG001 (fills the store)
    assert server.get(path).status == 404


@pytest.fixture(scope="module")
def traced(shared_store: StoreBuilder) -> None:
    path = shared_store.add_source("traced", b"traced").path
    create(shared_store, REALISATIONS + BUILD_TRACE)
    register(shared_store, HASH, "out", path)
    trace(shared_store, DRV, "out", path)


def test_output_outside_the_store_gets_404(serve: Callable[[], Server], store: StoreBuilder, path: StorePath) -> None:
    create(store, BUILD_TRACE)
    trace(store, DRV, "out", path)
    with store.connect() as connection:
        connection.execute("update BuildTraceV3 set outputPath = ?", ("/nix/store/nonsense",))
        connection.execute("update ValidPaths set path = ?", ("/nix/store/nonsense",))
    server = serve()
    assert server.get(f"/build-trace-v2/{DRV}/out.doi").status == 404
    assert server.wait_for_log(f"cannot use the database's row for {DRV}!out")

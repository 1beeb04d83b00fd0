"""After any change of the database, a narinfo from memory is the one that a fresh lookup gives."""

import asyncio
import os
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmonia.config import loader
from harmonia.errors import StoreObjectError
from harmonia.metrics.outcome import Outcome
from harmonia.nix import base32, narinfo
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey
from harmonia.process.loop_reads import LoopReads
from harmonia.server import absent_paths, path_lookup, worker
from harmonia.server.context import ServerContext
from harmonia.server.http.response_cache import ABSENT
from harmonia.server.resources.narinfo import Narinfos, nar_url
from harmonia.store.new_paths import PAGE_PATHS
from harmonia.store.store import Store
from harmonia.tools.store_builder import StoreBuilder

PATHS = [f"/nix/store/{base32.encode(bytes([number] * 20))}-path" for number in range(5)]
SIGNERS = [SecretKey.generate(f"signer-{number}") for number in range(2)]
KEY = SecretKey.generate("own-1")

_ROW = "select id, hash, narSize, sigs from ValidPaths where path = ? and hash not like '%malformed'"
_REFERENCES = "select path from Refs join ValidPaths on id = reference where referrer = ?"

paths = st.sampled_from(PATHS)
Change = Callable[[sqlite3.Connection], object]


@pytest.fixture(autouse=True)
def _reads_on_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep lookups on the event loop: on a busy machine, some would go to threads."""
    monkeypatch.setattr(LoopReads, "allowed", True)


def execute(statement: str, *parameters: object) -> Change:
    return lambda database: database.execute(statement, parameters)


def register(path: str, digest: int, size: int) -> Change:
    statement = "insert or ignore into ValidPaths (path, hash, registrationTime, narSize) values (?, ?, 1, ?)"
    return execute(statement, path, f"sha256:{digest:064x}", size)


def sign(path: str, signer: SecretKey) -> Change:
    """Add a signature by `signer` to the path as it is registered now."""

    def change(database: sqlite3.Connection) -> None:
        for number, nar_hash, size, sigs in database.execute(_ROW, (path,)).fetchall():
            references = sorted(name for (name,) in database.execute(_REFERENCES, (number,)))
            encoded = base32.encode(bytes.fromhex(nar_hash.rpartition(":")[2]))
            fingerprint = f"1;{path};sha256:{encoded};{size};{','.join(references)}".encode()
            signed = f"{sigs or ''} {signer.sign(fingerprint)}"
            database.execute("update ValidPaths set sigs = ? where id = ?", (signed, number))

    return change


def collect(path: str) -> Change:
    """Delete a path without other referrers, as the garbage collector does."""
    return execute(
        "delete from ValidPaths where path = ? and id not in (select reference from Refs where referrer <> reference)",
        path,
    )


def refer(referrer: str, reference: str) -> Change:
    return execute(
        "insert or ignore into Refs select a.id, b.id from ValidPaths a, ValidPaths b where a.path = ? and b.path = ?",
        referrer,
        reference,
    )


def set_column(path: str, column: str, value: object) -> Change:
    return execute(f"update ValidPaths set {column} = ? where path = ?", value, path)


changes = st.one_of(
    st.builds(register, paths, st.integers(0, 2), st.integers(1, 3)),
    st.builds(collect, paths),
    st.builds(refer, paths, paths),
    st.builds(sign, paths, st.sampled_from(SIGNERS)),
    st.builds(set_column, paths, st.just("sigs"), st.sampled_from([None, "", "malformed"])),
    st.builds(set_column, paths, st.just("ca"), st.sampled_from([None, f"text:sha256:{'0' * 52}", "malformed"])),
    st.builds(set_column, paths, st.just("narSize"), st.sampled_from([None, 0, 7, 8])),
    st.builds(set_column, paths, st.just("hash"), st.sampled_from([f"sha256:{'1' * 64}", "sha256:malformed"])),
    st.builds(set_column, paths, st.just("deriver"), st.sampled_from([None, f"{PATHS[0]}.drv", "/elsewhere"])),
    st.builds(set_column, paths, st.just("registrationTime"), st.integers(1, 9)),
    st.builds(
        lambda path: execute("delete from Refs where referrer in (select id from ValidPaths where path = ?)", path),
        paths,
    ),
    st.just(execute("delete from Refs where referrer = reference")),
)
steps = st.lists(st.lists(changes, min_size=1, max_size=3), min_size=1, max_size=12)
"""Transactions."""


def expected(store: Store, hash_part: str, signer: SecretKey | None) -> str | None:
    """Return the narinfo of a new lookup, "" if there is none, or None if the row is malformed."""
    try:
        info = store.path_info(hash_part)
    except StoreObjectError:
        return None
    fingerprint = info.fingerprint("/nix/store") if info else b""
    if info is None or (signer and not any(signer.public_key.verify(fingerprint, sig) for sig in info.sigs)):
        return ""
    nar = narinfo.NarFile(nar_url(info), "none", info.nar_hash, info.nar_size)
    return narinfo.render(info, "/nix/store", nar, narinfo.signatures(info, "/nix/store", [KEY]))


def prepared(builder: StoreBuilder, directory: str, rules: str = "") -> ServerContext:
    text = (
        f"real_nix_store = '{builder.real_dir}'\nnix_db_path = '{builder.db_path}'\nnar_compression = 'none'\n"
        f"cache_dir = '{directory}/cache'\ndebug_info = false\ndaemon_socket = ''\n{rules}"
    )
    return worker.prepare(loader.parse(text, "test", {}), [KEY])


@pytest.mark.parametrize("signer", [None, SIGNERS[0]], ids=["published", "published if signed"])
def test_narinfo_from_memory_is_that_of_a_new_lookup(signer: SecretKey | None) -> None:
    with tempfile.TemporaryDirectory() as directory:
        builder = StoreBuilder(directory)
        rules = "" if signer is None else f"[publish]\nsigned_by = ['{signer.public_key}']\n"
        context = prepared(builder, directory, rules)
        narinfos = Narinfos(context)
        fresh = Store("/nix/store", builder.real_dir, builder.db_path)

        async def check(transactions: list[list[Change]]) -> None:
            for transaction in transactions:
                with builder.connect() as database:
                    for change in transaction:
                        change(database)
                await asyncio.sleep(0)  # the next turn of the event loop looks for changes
                for path in PATHS:
                    hash_part = path.rpartition("/")[2][:32]
                    wanted = expected(fresh, hash_part, signer)
                    for _ in range(2):
                        found = narinfos.content_now(hash_part)
                        if wanted is None:
                            assert found is None
                        elif wanted == "":
                            assert found == (ABSENT, Outcome.NONE)
                        else:
                            assert found is not None
                            assert found[0].body.decode() == wanted

        @given(steps)
        def changed(transactions: list[list[Change]]) -> None:
            clear = [execute("delete from Refs"), execute("delete from ValidPaths")]
            asyncio.run(check([clear, [register(path, 0, 1) for path in PATHS], *transactions]))

        changed()
        context.close()


def test_replaced_database_is_read_in_the_next_turn_of_the_event_loop(tmp_path: Path) -> None:
    builder, other = StoreBuilder(tmp_path / "one"), StoreBuilder(tmp_path / "other")
    removed, added = builder.add_text("removed", b""), other.add_text("added", b"")
    context = prepared(builder, str(tmp_path))
    narinfos = Narinfos(context)

    def outcome(info: PathInfo) -> Outcome | None:
        found = narinfos.content_now(info.path.hash_part)
        return None if found is None else found[1]

    async def check() -> None:
        assert outcome(removed) is Outcome.STORE
        assert outcome(added) is Outcome.NONE
        os.replace(other.db_path, builder.db_path)
        await asyncio.sleep(0)
        assert outcome(removed) is Outcome.NONE
        assert outcome(added) is Outcome.STORE

    asyncio.run(check())
    context.close()


def lookups(context: ServerContext) -> float:
    """Return the number of queries on the event loop."""
    return sum(context.metrics.own.database.cells[:-1])


def missing_hash_part(number: int) -> str:
    return base32.encode((1000 + number).to_bytes(20, "little"))


def test_missing_paths_are_not_looked_up_again_after_each_commit(tmp_path: Path) -> None:
    builder = StoreBuilder(tmp_path / "store")
    context = prepared(builder, str(tmp_path))
    narinfos = Narinfos(context)

    async def queries_of_a_round(added: int) -> float:
        builder.add_text(f"added-{added}", b"")
        await asyncio.sleep(0)
        before = lookups(context)
        for number in range(100):
            assert narinfos.content_now(missing_hash_part(number)) == (ABSENT, Outcome.NONE)
        return lookups(context) - before

    async def check() -> None:
        assert await queries_of_a_round(0) >= 100
        assert [await queries_of_a_round(added) for added in range(1, 4)] == [1, 1, 1]

    asyncio.run(check())
    context.close()


@pytest.mark.parametrize("added", [1, PAGE_PATHS - 1, PAGE_PATHS, 2 * PAGE_PATHS])
def test_missing_path_is_found_among_many_new_paths(tmp_path: Path, added: int) -> None:
    builder = StoreBuilder(tmp_path / "store")
    context = prepared(builder, str(tmp_path))
    narinfos = Narinfos(context)

    async def check() -> None:
        assert narinfos.content_now(missing_hash_part(added - 1)) == (ABSENT, Outcome.NONE)
        with builder.connect() as database:
            for number in range(added):
                register(f"/nix/store/{missing_hash_part(number)}-path", 0, 1)(database)
        await asyncio.sleep(0)
        found = narinfos.content_now(missing_hash_part(added - 1))
        assert found is not None
        assert found[1] is Outcome.STORE

    asyncio.run(check())
    context.close()


@pytest.mark.parametrize(("added", "wait_s"), [(0, 0.0), (5, 11.0)], ids=["lower numbers", "higher numbers"])
def test_path_of_a_restored_backup_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, added: int, wait_s: float
) -> None:
    """A backup may have a path under a number that was used for another path. Higher ones hide that for 10 s."""
    builder, backup = StoreBuilder(tmp_path / "store"), StoreBuilder(tmp_path / "backup")
    for number in range(3):
        builder.add_text(f"text-{number}", b"")
    missing = backup.add_text("missing", b"")
    for number in range(added):
        backup.add_text(f"other-{number}", b"")
    context = prepared(builder, str(tmp_path))
    narinfos = Narinfos(context)
    now = [0.0]
    for module in (path_lookup, absent_paths):
        monkeypatch.setattr(module, "monotonic", lambda: now[0])

    async def check() -> None:
        assert narinfos.content_now(missing.path.hash_part) == (ABSENT, Outcome.NONE)
        with sqlite3.connect(backup.db_path) as source, builder.connect() as target:
            source.backup(target)
        await asyncio.sleep(0)
        if wait_s:
            assert narinfos.content_now(missing.path.hash_part) == (ABSENT, Outcome.NONE)
        now[0] += wait_s
        await asyncio.sleep(0)
        found = narinfos.content_now(missing.path.hash_part)
        assert found is not None
        assert found[1] is Outcome.STORE

    asyncio.run(check())
    context.close()

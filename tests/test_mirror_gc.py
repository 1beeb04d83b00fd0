"""`harmonia mirror gc` deletes only what no path that stays needs, and `verify` finds what is wrong in a bucket."""

import asyncio
import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Collection
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Self

import pytest

from harmonia.config.loader import parse
from harmonia.mirror import collector
from harmonia.mirror.bucket import Bucket
from harmonia.mirror.collector import Collector, Deletion
from harmonia.mirror.connection import open_bucket
from harmonia.mirror.target import BucketTarget
from harmonia.mirror.verify import Contents, read_contents
from harmonia.nix import narinfo
from harmonia.nix.path_info import PathInfo
from harmonia.nix.store_path import StorePath
from harmonia.store.store import Store
from harmonia.tools.store_builder import StoreBuilder
from harmonia.upload.nar_files import NarFiles
from harmonia.upload.target import TargetChangedError, TargetRefusedError
from harmonia.upload.uploader import Outcome, Uploader
from support import debug_info, preloaded
from support.mirrors import KEY, chain, configure, mirror
from support.running import HARMONIA, PATIENCE_S, patched, run, wait_until
from support.s3_service import Folder

pytestmark = pytest.mark.s3

DAY = timedelta(days=1)
NONE = timedelta(0)


@pytest.fixture
def store(tmp_path: Path) -> StoreBuilder:
    return StoreBuilder(tmp_path / "store")


@pytest.fixture
def config(store: StoreBuilder, folder: Folder, tmp_path: Path) -> str:
    return configure(store, tmp_path, folder.settings())


@pytest.fixture(autouse=True)
def _short_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let collectors in this process wait less for others that begin at the same time."""
    monkeypatch.setattr(collector, "_SETTLE_S", 0.05)


def bucket(config: str) -> Bucket:
    return open_bucket(parse(Path(config).read_text(), config, {}))


def collect(config: str, keep: timedelta, keep_nars: timedelta = 30 * DAY, *, dry_run: bool = False) -> list[Deletion]:
    """Collect garbage, and return the deletions."""
    deletions: list[Deletion] = []
    asyncio.run(Collector(bucket(config), "/nix/store", keep, keep_nars).collect(deletions.append, dry_run=dry_run))
    return deletions


def verify(config: str, status: int = 0, *options: str) -> str:
    answer = run("--config", config, "mirror", "verify", *options)
    assert answer.returncode == status, answer.stderr
    return answer.stdout


def tree(store: StoreBuilder) -> dict[str, PathInfo]:
    """Add two tops that share a path, and each have one more."""
    added = {name: store.add_text(name, name.encode()) for name in ("shared", "old-dep", "new-dep")}
    for name in ("old", "new"):
        references = [added["shared"].path, added[f"{name}-dep"].path]
        added[name] = store.add(store.output_path(name), name.encode(), references=references)
    return added


@pytest.fixture
def pause(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function that waits until objects have a later time, and sets the clock of later collectors.

    With `keep=DAY`, they keep the objects that are written after the pause, however long that takes.
    """

    def pause() -> None:
        written = int(time.time())  # the clock of S3 shows full seconds
        wait_until(lambda: time.time() >= written + 1)
        in_a_day = datetime.fromtimestamp(written + 0.5, UTC) + DAY

        class Clock(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> Self:
                assert tz is UTC
                return cls.combine(in_a_day.date(), in_a_day.timetz())

        monkeypatch.setattr(collector, "datetime", Clock)

    return pause


def test_old_paths_are_deleted_and_the_closures_of_new_ones_stay(
    store: StoreBuilder, config: str, folder: Folder, pause: Callable[[], None]
) -> None:
    added = tree(store)
    mirror(config, added["old"].path)
    pause()
    mirror(config, added["new"].path)
    planned = collect(config, DAY, dry_run=True)
    assert len(folder.paths()) == 5
    deleted = collect(config, DAY)
    assert {each.key for each in planned} == {each.key for each in deleted}
    kept = {added[name].path.hash_part for name in ("new", "new-dep", "shared")}
    assert folder.paths().keys() == kept
    assert {key for key in folder.objects() if key.endswith(".ls")} == {f"{each}.ls" for each in kept}
    assert len([key for key in folder.objects() if key.startswith("nar/")]) == 5  # clients remember narinfos
    folder.check_closed()
    verify(config)


def test_path_that_is_named_again_stays(
    store: StoreBuilder, config: str, folder: Folder, pause: Callable[[], None]
) -> None:
    added = tree(store)
    mirror(config, added["old"].path)
    pause()
    mirror(config, added["old"].path)
    assert collect(config, DAY) == []
    assert len(folder.paths()) == 3


def test_nar_is_deleted_when_no_narinfo_has_named_it_for_long(store: StoreBuilder, config: str, folder: Folder) -> None:
    debug = debug_info.add(store, "debug", debug_info.ONE)
    mirror(config, debug.path)
    ((_, nar),) = folder.paths().values()
    assert {each.key for each in collect(config, NONE, NONE)} == {
        f"{debug.path.hash_part}.narinfo",
        f"{debug.path.hash_part}.ls",
        f"debuginfo/{debug_info.ONE}.debug",
    }
    assert collect(config, NONE) == []
    assert [each.key for each in collect(config, NONE, NONE)] == [nar.url]
    assert folder.objects().keys() == {"nix-cache-info", "harmonia/collection"}


def test_nar_stays_as_long_as_clients_remember_a_narinfo_between_two_collections(
    store: StoreBuilder, config: str, folder: Folder
) -> None:
    info = store.add_text("text", b"text")
    mirror(config, info.path)
    ((_, nar),) = folder.paths().values()
    collect(config, NONE, NONE)  # deletes the narinfo, and marks the NAR
    mirror(config, info.path)  # names the NAR again
    assert nar.url not in {each.key for each in collect(config, NONE, NONE)}
    assert nar.url in folder.objects()
    assert [each.key for each in collect(config, NONE, NONE)] == [nar.url]


def test_nar_that_is_named_again_stays(store: StoreBuilder, config: str, folder: Folder) -> None:
    info = store.add_text("again", b"again")
    mirror(config, info.path)
    collect(config, NONE)
    collect(config, NONE)
    mirror(config, info.path)
    assert collect(config, DAY, NONE) == []
    assert not [key for key in folder.objects() if key.startswith("harmonia/unused/")]
    verify(config)


def test_second_collection_is_refused_while_one_runs(store: StoreBuilder, config: str, folder: Folder) -> None:
    mirror(config, store.add_text("a", b"a").path)
    collect(config, DAY)
    folder.put("harmonia/collection", folder.get("harmonia/collection").replace(b'"done"', b'"running"'))
    answer = run("--config", config, "mirror", "gc", "--keep", "1d")
    assert answer.returncode == 1
    assert "another garbage collection runs on" in answer.stderr
    assert "0 narinfos" in run("--config", config, "mirror", "gc", "--keep", "1d", "--dry-run").stderr


@pytest.mark.parametrize("written", ["2026-01-01T00:00:00", "yesterday", 7, None])
def test_malformed_state_of_a_collection_is_an_error_with_a_remedy(
    config: str, store: StoreBuilder, folder: Folder, *, written: object
) -> None:
    state = {"run": "other", "state": "running", "host": "host:1", "written": written}
    folder.put("harmonia/collection", json.dumps(state).encode())
    for command in (["gc", "--keep", "1d"], [store.add_text("a", b"a").path]):
        answer = run("--config", config, "mirror", *command)
        assert answer.returncode == 1
        assert "/harmonia/collection: malformed; delete it" in answer.stderr
        assert "Traceback" not in answer.stderr


def test_collection_that_lost_its_lease_deletes_nothing_more(store: StoreBuilder, config: str, folder: Folder) -> None:
    top = chain(store, 3)[-1].path
    mirror(config, top)
    other = {"run": "other", "state": "running", "host": "host:1", "written": datetime.now(UTC).isoformat()}

    def take_over(_: Deletion) -> None:
        folder.put("harmonia/collection", json.dumps(other).encode())

    collection = Collector(bucket(config), "/nix/store", NONE, NONE).collect(take_over, dry_run=False)
    with pytest.raises(TargetRefusedError, match="lost its lease"):
        asyncio.run(collection)
    assert len(folder.paths()) == 2
    assert json.loads(folder.get("harmonia/collection")) == other
    folder.check_closed()


def test_lease_is_renewed_while_the_bucket_is_read(
    store: StoreBuilder, config: str, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror(config, store.add_text("a", b"a").path)

    async def read_slowly(bucket: Bucket, store_dir: str) -> Contents:
        written = folder.get("harmonia/collection")
        await asyncio.to_thread(wait_until, lambda: folder.get("harmonia/collection") != written)
        return await read_contents(bucket, store_dir)

    monkeypatch.setattr(collector, "_RENEWAL_S", 0.2)
    monkeypatch.setattr(collector, "read_contents", read_slowly)
    assert len(collect(config, NONE, NONE)) == 2
    assert b'"done"' in folder.get("harmonia/collection")


def test_writer_waits_for_a_collection_and_writes_again_what_it_deleted(
    store: StoreBuilder, config: str, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer finds the whole closure, while the collection has already listed it as garbage."""
    top = chain(store, 2)[-1].path
    mirror(config, top)
    writers: list[subprocess.Popen[str]] = []

    async def read_and_start_a_writer(bucket: Bucket, store_dir: str) -> Contents:
        contents = await read_contents(bucket, store_dir)
        writer = preloaded.popen(
            [*HARMONIA, "--config", config, "mirror", top], env=dict(os.environ), stderr=subprocess.PIPE, text=True
        )
        assert writer.stderr is not None
        writers.append(writer)
        while line := writer.stderr.readline():  # without a line, it has ended
            if "a garbage collection runs on" in line:
                break
        return contents

    monkeypatch.setattr(collector, "read_contents", read_and_start_a_writer)
    assert len(collect(config, NONE)) == 4
    _, stderr = writers[0].communicate(timeout=PATIENCE_S)
    assert writers[0].returncode == 0
    assert "2 written" in stderr
    assert len(folder.paths()) == 2
    folder.check_closed()


def test_dry_run_prints_what_and_why(store: StoreBuilder, config: str, folder: Folder) -> None:
    info = store.add_text("a", b"a")
    mirror(config, info.path)
    answer = run("--config", config, "mirror", "gc", "--keep", "0", "--dry-run")
    assert answer.returncode == 0, answer.stderr
    assert f"{info.path.hash_part}.narinfo: neither written nor named for 0 days" in answer.stdout
    assert "1 narinfos, 0 NARs and 1 other objects would be deleted" in answer.stderr
    assert len(folder.paths()) == 1


@pytest.mark.parametrize("option", ["--keep", "--keep-nars"])
def test_wrong_time_to_keep_is_one_line(config: str, option: str) -> None:
    for value in ("1x", "-1d", "99999999999999d"):
        answer = run("--config", config, "mirror", "gc", "--keep", "1d", option, value)
        assert answer.returncode == 2
        assert answer.stderr.startswith(f"harmonia: Invalid value for '{option}': ")
        assert answer.stderr.count("\n") == 1


def test_malformed_narinfo_stops_the_collection(store: StoreBuilder, config: str, folder: Folder) -> None:
    """Its references are unknown, so nothing is known to be unused."""
    infos = chain(store, 2)
    mirror(config, infos[1].path)
    folder.put(f"{infos[1].path.hash_part}.narinfo", b"damaged")
    answer = run("--config", config, "mirror", "gc", "--keep", "0")
    assert answer.returncode == 1
    assert f"{infos[1].path.hash_part}.narinfo: " in answer.stderr
    assert f"{infos[0].path.hash_part}.narinfo" in folder.objects()
    assert b'"done"' in folder.get("harmonia/collection")


def test_killed_collection_leaves_whole_closures(store: StoreBuilder, config: str, folder: Folder) -> None:
    moments = random.Random(3)
    top = chain(store, 25)[-1].path
    announcing = patched("""
from harmonia.mirror import collector
from harmonia.mirror.bucket import Bucket
delete = Bucket.delete
async def announced(self, keys):
    print("deletes", flush=True)
    await delete(self, keys)
Bucket.delete, collector._SETTLE_S = announced, 0.05
""")
    for _ in range(3):
        mirror(config, top)
        command = [*announcing, "--config", config, "mirror", "gc", "--keep", "0"]
        with preloaded.popen(command, env=dict(os.environ), stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(moments.randrange(1, 25)):  # the narinfos of a chain are deleted one after the other
                assert process.stdout.readline() == "deletes\n"
            process.kill()
        folder.check_closed()
        folder.delete("harmonia/collection")


def test_upload_fails_if_a_collection_deleted_its_references_meanwhile(
    store: StoreBuilder, config: str, folder: Folder
) -> None:
    infos = chain(store, 2)
    mirror(config, infos[0].path)
    settings = parse(Path(config).read_text(), config, {})

    async def upload() -> None:
        target = BucketTarget(settings, bucket(config))
        assert await target.missing([info.path for info in infos]) == {infos[1].path}
        nars = NarFiles(settings, store.real_dir)
        nar = await nars.open_file(infos[1])
        await target.put_nar(nar.file.url, nar)
        await Collector(bucket(config), "/nix/store", NONE, NONE).collect(lambda _: None, dry_run=False)
        with pytest.raises(TargetChangedError, match="a garbage collection deleted a part of the closure"):
            await target.put_narinfo(infos[1].path, narinfo.render(infos[1], "/nix/store", nar.file, []))
        nar.close()
        nars.close()
        await target.close()

    asyncio.run(upload())
    assert folder.paths() == {}
    mirror(config, infos[1].path)
    verify(config)


def test_uploader_writes_references_again_that_a_collection_deleted(
    store: StoreBuilder, config: str, folder: Folder
) -> None:
    """A watcher remembers for minutes that the bucket has a reference."""
    infos = chain(store, 2)
    settings = parse(Path(config).read_text(), config, {})

    async def write(uploader: Uploader, info: PathInfo) -> list[Outcome]:
        outcomes: list[Outcome] = []
        planned, _ = await uploader.plan([info.path])
        await uploader.upload(planned, lambda _, outcome: outcomes.append(outcome))
        return outcomes

    async def run_uploads() -> None:
        target = BucketTarget(settings, bucket(config))
        with (
            closing(NarFiles(settings, store.real_dir)) as nars,
            closing(Uploader(Store.of(settings), target, nars, jobs=2)) as uploader,
        ):
            assert await write(uploader, infos[0]) == [None]
            await Collector(bucket(config), "/nix/store", NONE, NONE).collect(lambda _: None, dry_run=False)
            [failure] = await write(uploader, infos[1])
            assert isinstance(failure, TargetChangedError)
            assert await write(uploader, infos[1]) == [None, None]
        await target.close()

    asyncio.run(run_uploads())
    assert len(folder.paths()) == 2
    folder.check_closed()


def test_plan_ends_without_a_path_that_both_the_store_and_the_bucket_have_deleted(
    store: StoreBuilder, config: str, folder: Folder
) -> None:
    info = store.add_text("path", b"content")
    mirror(config, info.path)
    settings = parse(Path(config).read_text(), config, {})

    asked: list[set[StorePath]] = []

    class Target(BucketTarget):
        async def keep(self, paths: Collection[StorePath]) -> set[StorePath]:
            asked.append({*paths})
            assert asked in ([{info.path}], [{info.path}, set()])
            if paths:
                store.delete(info.path)
                await Collector(bucket(config), "/nix/store", NONE, NONE).collect(lambda _: None, dry_run=False)
            return await super().keep(paths)

    async def plan() -> tuple[list[PathInfo], int]:
        target = Target(settings, bucket(config))
        with (
            closing(NarFiles(settings, store.real_dir)) as nars,
            closing(Uploader(Store.of(settings), target, nars, jobs=2)) as uploader,
        ):
            planned = await uploader.plan([info.path])
        await target.close()
        return planned

    assert asyncio.run(plan()) == ([], 0)
    assert folder.paths() == {}


def test_verify_compares_a_shared_nar_with_each_narinfo(store: StoreBuilder, config: str, folder: Folder) -> None:
    infos = [store.add(store.output_path(name), b"the same") for name in ("one", "two", "three")]
    mirror(config, *(info.path for info in infos))
    assert len({nar.url for _, nar in folder.paths().values()}) == 1
    assert verify(config) == ""
    for info in infos:
        key = f"{info.path.hash_part}.narinfo"
        text, (found, nar) = folder.get(key), folder.paths()[info.path.hash_part]
        wrong = replace(found, nar_hash=bytes(32))
        folder.put(key, narinfo.render(wrong, "/nix/store", nar, [KEY.sign(wrong.fingerprint("/nix/store"))]).encode())
        assert (
            f"wrong: {nar.url}: the unpacked NAR has another NarHash or NarSize, by the narinfo of {info.path}"
            in verify(config, 3)
        )
        folder.put(key, text)


def test_verify_finds_each_kind_of_damage(store: StoreBuilder, config: str, folder: Folder) -> None:
    infos = chain(store, 6)
    mirror(config, infos[-1].path)
    assert verify(config) == ""
    keys = [f"{info.path.hash_part}.narinfo" for info in infos]
    nars = [folder.paths()[info.path.hash_part][1].url for info in infos]
    content = folder.get(nars[1])
    folder.put(nars[1], content[:-1] + bytes([content[-1] ^ 1]))
    folder.put(nars[2], content + content)
    folder.delete(nars[3])
    folder.put(keys[4], folder.get(keys[4]).replace(b"Sig: mirror-1:", b"Sig: other-1:"))
    folder.delete(keys[0])
    folder.put(keys[5], b"not a narinfo")
    found = verify(config, 3)
    for expected in (
        f"wrong: {keys[1]}: its reference {infos[0].path} is missing",
        f"wrong: {nars[1]}: ",
        f"wrong: {keys[2]}: its NAR {nars[2]} has",
        f"wrong: {keys[3]}: its NAR {nars[3]} is missing",
        f"wrong: {keys[4]}: no signature by any of the public keys",
        f"wrong: {keys[5]}: ",
    ):
        assert expected in found, found
    assert f"wrong: {nars[1]}: " not in verify(config, 3, "--no-content")


def test_verify_finds_damage_beside_narinfos(store: StoreBuilder, config: str, folder: Folder) -> None:
    info = store.add_text("one", b"one")
    mirror(config, info.path)
    cache_info, listing = folder.get("nix-cache-info"), f"{info.path.hash_part}.ls"
    absent = "0" * 32 + "-absent"
    damaged = {
        listing: b'{"version":1,"root":',
        f"realisations/sha256:{'0' * 64}!out.doi": b"[]",
        f"realisations/sha256:{'1' * 64}!out.doi": f'{{"id":"","outPath":"{absent}"}}'.encode(),
        f"build-trace-v2/{absent}.drv/out.doi": b"",
        f"build-trace-v2/{absent}.drv/dev.doi": f'{{"outPath":"{absent}","signatures":[]}}'.encode(),
        f"debuginfo/{'0' * 40}.debug": b'{"archive":"../nar/0.nar.zst","member":"x"}',
    }
    for key, text in damaged.items():
        folder.put(key, text)
    found = verify(config, 3).splitlines()
    keys = [line.split(": ")[1] for line in found]
    assert sorted(keys) == sorted(key.partition(": ")[0] for key in damaged), found
    assert f"wrong: {listing}" not in verify(config, 3, "--no-content")
    for key in damaged:
        folder.delete(key)
    folder.delete("nix-cache-info")
    assert "wrong: nix-cache-info: missing" in verify(config, 3)
    folder.put("nix-cache-info", b"StoreDir: /gnu/store\n")
    assert "wrong: nix-cache-info: its StoreDir is /gnu/store" in verify(config, 3)
    folder.put("nix-cache-info", cache_info)
    assert verify(config) == ""

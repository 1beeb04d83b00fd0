"""A job runs once for all callers that want its result at the same time."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harmonia.metrics.shared_counters import Metrics
from harmonia.nix import narinfo
from harmonia.nix.signing import SecretKey
from harmonia.nix.store_path import StorePath
from harmonia.process import loop_reads
from harmonia.process.loop_reads import LoopReads
from harmonia.process.single_flight import SingleFlight
from harmonia.process.threads import Threads
from harmonia.server.path_lookup import Paths, SignedPath
from harmonia.store.store import Store
from harmonia.tools.store_builder import StoreBuilder
from support.running import PATIENCE_S

CALLERS = 50


class Job:
    def __init__(self) -> None:
        self.runs = 0
        self.go = asyncio.Event()

    async def __call__(self) -> int:
        self.runs += 1
        await self.go.wait()
        return self.runs


def test_concurrent_callers_share_a_run_and_a_later_caller_gets_a_new_one() -> None:
    async def check() -> None:
        flights, job = SingleFlight(), Job()
        callers = [asyncio.create_task(flights.run("key", job)) for _ in range(CALLERS)]
        await asyncio.sleep(0)
        job.go.set()
        assert await asyncio.gather(*callers) == [1] * CALLERS
        assert await flights.run("key", job) == 2

    asyncio.run(check())


def test_different_keys_run_at_the_same_time() -> None:
    async def check() -> None:
        flights, one, other = SingleFlight(), Job(), Job()
        callers = [asyncio.create_task(flights.run(job, job)) for job in (one, other)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (one.runs, other.runs) == (1, 1)
        one.go.set()
        other.go.set()
        assert await asyncio.gather(*callers) == [1, 1]

    asyncio.run(check())


def test_cancelled_caller_cancels_neither_the_run_nor_other_callers() -> None:
    async def check() -> None:
        flights, job = SingleFlight(), Job()
        first, second = [asyncio.create_task(flights.run("key", job)) for _ in range(2)]
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        job.go.set()
        assert await second == 1
        assert first.cancelled()

    asyncio.run(check())


def test_error_reaches_all_callers_and_is_not_remembered(caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        flights = SingleFlight()

        async def fail() -> int:
            await asyncio.sleep(0)
            raise OSError("no disk")

        results = await asyncio.gather(*(flights.run("key", fail) for _ in range(3)), return_exceptions=True)
        assert [str(result) for result in results] == ["no disk"] * 3
        gone = asyncio.create_task(flights.run("key", fail))
        await asyncio.sleep(0)
        gone.cancel()
        job = Job()
        job.go.set()
        await asyncio.sleep(0.01)
        assert await flights.run("key", job) == 1

    asyncio.run(check())
    assert not caplog.records  # for example "exception was never retrieved"


class Lookups:
    """Counts of the database lookups and signatures that clients of one store cause."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.builder = StoreBuilder(directory / "store")
        self.path_rows = self.signatures = 0
        path_row, signatures = Store.path_row, narinfo.signatures

        def counted_path_row(store: Store, hash_part: str, **how: bool) -> object:
            self.path_rows += 1
            return path_row(store, hash_part, **how)

        def counted_signatures(*arguments: object) -> object:
            self.signatures += 1
            return signatures(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(Store, "path_row", counted_path_row)
        monkeypatch.setattr(narinfo, "signatures", counted_signatures)

    def run(self, check: Callable[[Paths], Awaitable[None]]) -> None:
        def store() -> Store:
            return Store(self.builder.store_dir, self.builder.real_dir, self.builder.db_path)

        async def checked() -> None:
            metrics = Metrics(("narinfo",), (), 1, [])
            metrics.adopt_slot(0)
            keys = [SecretKey.generate("cache.example-1")]
            await check(Paths(store(), self.builder.db_path, keys, None, Threads(store(), metrics)))

        asyncio.run(checked())


async def ask(paths: Paths, path: StorePath) -> list[SignedPath | None]:
    return await asyncio.gather(*(paths.lookup_path(path.hash_part) for _ in range(CALLERS)))


def test_clients_of_one_cold_path_cause_one_lookup_and_one_signature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lookups = Lookups(tmp_path, monkeypatch)
    path = lookups.builder.add_source("cold", b"contents").path

    async def check(paths: Paths) -> None:
        found = await ask(paths, path)
        assert len(set(map(id, found))) == 1
        assert found[0] is not None
        assert found[0].info.path == path
        assert (lookups.path_rows, lookups.signatures) == (1, 1)

    lookups.run(check)


def test_clients_of_one_absent_path_cause_one_lookup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lookups = Lookups(tmp_path, monkeypatch)
    lookups.builder.add_source("present", b"contents")

    async def check(paths: Paths) -> None:
        assert await ask(paths, StorePath("0" * 32 + "-absent")) == [None] * CALLERS
        assert lookups.path_rows == 1

    lookups.run(check)


def test_path_registered_during_a_lookup_is_found_by_the_next_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoopReads, "allowed", False)  # look paths up in a thread
    lookups = Lookups(tmp_path, monkeypatch)
    builder = lookups.builder
    late = builder.output_path("late")

    async def check(paths: Paths) -> None:
        busy = asyncio.Event()
        loop = asyncio.get_running_loop()

        def lookup(*arguments: Any) -> object:
            found = read_path(*arguments)  # before the path is registered
            loop.call_soon_threadsafe(busy.set)
            asyncio.run_coroutine_threadsafe(go.wait(), loop).result(PATIENCE_S)
            return found

        go = asyncio.Event()
        read_path = paths._read_path  # noqa: SLF001 (replaced by a slow lookup)
        monkeypatch.setattr(paths, "_read_path", lookup)
        early = asyncio.create_task(paths.lookup_path(late.hash_part))
        await busy.wait()
        monkeypatch.setattr(paths, "_read_path", read_path)
        builder.add(late, b"contents")
        following = asyncio.create_task(paths.lookup_path(late.hash_part))
        await asyncio.sleep(0)
        go.set()
        found = await following
        assert found is not None
        assert found.info.path == late
        assert await early is None

    lookups.run(check)


def test_lookup_goes_to_a_thread_for_a_second_after_a_slow_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lookups = Lookups(tmp_path, monkeypatch)
    hash_parts = [lookups.builder.add_source(f"path-{number}", b"").path.hash_part for number in range(5)]
    threads: list[str] = []
    seconds = 100.0
    took = 0.0
    path_row = Store.path_row

    def slow_path_row(store: Store, hash_part: str, **how: bool) -> object:
        nonlocal seconds
        seconds += took
        threads.append(threading.current_thread().name)
        return path_row(store, hash_part, **how)

    monkeypatch.setattr(Store, "path_row", slow_path_row)
    monkeypatch.setattr(loop_reads, "monotonic", lambda: seconds)
    monkeypatch.setattr(loop_reads, "getrusage", lambda _: SimpleNamespace(ru_inblock=0, ru_nivcsw=0))

    async def check(paths: Paths) -> None:
        nonlocal took, seconds
        steps = ((0.01, 0), (0.03, 0), (0.01, 0.5), (0.0, 0.6), (0.0, 0))
        for hash_part, (slowness, pause) in zip(hash_parts, steps, strict=True):
            took = slowness
            assert await paths.lookup_path(hash_part) is not None
            seconds += pause
        main = threading.main_thread().name
        assert [name == main for name in threads] == [True, True, False, False, True]

    lookups.run(check)

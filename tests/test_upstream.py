"""Upstreams: responses are verified piece by piece, and a failing upstream is left alone."""

import asyncio
import gc
import hashlib
import math
import ssl
import time
import tracemalloc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from harmonia.cache.disk_cache import DiskCache
from harmonia.config.proxy import ProxyRules
from harmonia.config.tables.upstream import Upstream
from harmonia.errors import FormatError, UpstreamError
from harmonia.metrics.shared_counters import Metrics
from harmonia.nix.narinfo import NarFile
from harmonia.nix.path_info import PathInfo
from harmonia.nix.store_path import StorePath
from harmonia.process import loop_reads
from harmonia.process.threads import Threads
from harmonia.upstream import breaker, failed_nars, lookup_cache, nar_verifier
from harmonia.upstream.answer import Answer
from harmonia.upstream.bodies import PassthroughBody
from harmonia.upstream.breaker import Breaker
from harmonia.upstream.client import Client
from harmonia.upstream.failed_nars import FailedNars
from harmonia.upstream.lookup import UpstreamPool
from harmonia.upstream.loop_guard import VIA, Via
from harmonia.upstream.nar_verifier import has_file_hash
from harmonia.upstream.refusals import Reason, UpstreamMismatchError
from harmonia.upstream.remote_path import RemotePath
from harmonia.upstream.small_nars import SmallNars
from harmonia.upstream.transport import Part, Transport
from support.packing import PACK
from support.running import PATIENCE_S
from support.upstream_server import UpstreamServer

PATH = StorePath(f"{'0' * 32}-x")
CONTENT = b"content" * 100_000
INFO = PathInfo(PATH, hashlib.sha256(CONTENT).digest(), len(CONTENT))


def check(info: PathInfo, compression: str, file: bytes) -> None:
    nar_verifier.check_content(info, NarFile("x", compression), [file[:1000], file[1000:]])


@pytest.mark.parametrize("compression", sorted(PACK))
def test_nar_is_accepted_only_with_its_hash_and_size(compression: str) -> None:
    file = PACK[compression](CONTENT)
    check(INFO, compression, file)
    for other in (
        replace(INFO, nar_hash=bytes(32)),
        replace(INFO, nar_size=len(CONTENT) + 1),
        replace(INFO, nar_size=len(CONTENT) - 1),
    ):
        with pytest.raises(FormatError):
            check(other, compression, file)
    with pytest.raises(FormatError):
        check(INFO, compression, file[:-1])
    with pytest.raises(FormatError):
        check(INFO, compression, b"garbage" + file)


def test_file_hash_is_compared_with_the_file_or_the_nar() -> None:
    assert has_file_hash(INFO, NarFile("x", "xz", bytes(32)), bytes(32))
    assert not has_file_hash(INFO, NarFile("x", "xz", bytes(32)), bytes(31))
    assert not has_file_hash(INFO, NarFile("x", "xz"), bytes(32))
    assert has_file_hash(INFO, NarFile("x", "none", bytes(32)), INFO.nar_hash)
    assert not has_file_hash(INFO, NarFile("x", "none", bytes(32)), bytes(32))


def test_failed_nar_is_remembered_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = FailedNars()
    failed.add("upstream", "key")
    assert failed.has("upstream", "key")
    assert not failed.has("other", "key")
    assert not failed.has("upstream", "other")
    failed.remove("upstream", "other")
    assert failed.has("upstream", "key")
    monkeypatch.setattr(time, "monotonic", lambda: time.monotonic_ns() / 1e9 + failed_nars.TTL_S + 1)
    assert not failed.has("upstream", "key")
    monkeypatch.undo()
    assert failed.has("upstream", "key")
    failed.remove("upstream", "key")
    assert not failed.has("upstream", "key")


class ProbedUpstream:
    """An upstream that a circuit breaker probes."""

    def __init__(self, *, works: bool) -> None:
        self.works = works
        self.probes = 0
        self.states: list[str | None] = []
        """The reason of each opening, and None for each closing."""

    async def probe(self) -> bool:
        self.probes += 1
        return self.works

    def breaker(self) -> Breaker:
        return Breaker(self.probe, self.states.append)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 (no event to wait for)
            await asyncio.sleep(0.001)


@pytest.fixture(autouse=True)
def _short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(breaker, "LONGEST_DELAY", 0.02)


def test_breaker_closes_when_the_upstream_answers() -> None:
    async def run() -> None:
        upstream = ProbedUpstream(works=False)
        breaker_ = upstream.breaker()
        breaker_.start(10)
        assert not await breaker_.usable()
        upstream.works = True
        await until(lambda: breaker_.closed)
        assert upstream.states == [None]
        await breaker_.stop()

    asyncio.run(run())


def test_hanging_first_probe_is_not_waited_for() -> None:
    async def run() -> None:
        breaker_ = Breaker(asyncio.Event().wait, lambda _: None)
        breaker_.start(0.01)
        async with asyncio.timeout(PATIENCE_S):
            assert not await breaker_.usable()
        await breaker_.stop()

    asyncio.run(run())


def test_breaker_probes_again_after_any_error(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        upstream = ProbedUpstream(works=True)
        shortages = [RuntimeError("can't start new thread"), MemoryError()]

        async def probe() -> bool:
            if shortages:
                raise shortages.pop()
            return await upstream.probe()

        breaker_ = Breaker(probe, upstream.states.append)
        breaker_.start(10)
        await until(lambda: breaker_.closed)
        await breaker_.stop()

    asyncio.run(run())
    assert [record.getMessage() for record in caplog.records] == ["cannot probe an upstream"] * 2


def test_breaker_opens_after_consecutive_failures() -> None:
    async def run() -> None:
        upstream = ProbedUpstream(works=True)
        breaker_ = upstream.breaker()
        breaker_.start(10)
        assert await breaker_.usable()
        for _ in range(10):
            breaker_.failed("it is gone")
            breaker_.failed("it is gone")
            breaker_.succeeded()
        assert breaker_.closed
        upstream.works = False
        for _ in range(breaker.MAX_FAILURES):
            breaker_.failed("it is gone")
        assert not breaker_.closed
        before = upstream.probes
        await until(lambda: upstream.probes >= before + 3)
        assert not await breaker_.usable()
        upstream.works = True
        await until(lambda: breaker_.closed)
        assert upstream.states == [None, "it is gone", None]
        await breaker_.stop()

    asyncio.run(run())


def test_retry_after_opens_the_breaker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "LONGEST_DELAY", 60)

    async def run() -> None:
        upstream = ProbedUpstream(works=True)
        breaker_ = upstream.breaker()
        breaker_.start(10)
        assert await breaker_.usable()
        breaker_.failed("it is busy", retry_after=30)
        assert not breaker_.closed
        await asyncio.sleep(0.05)
        assert upstream.probes == 1
        await breaker_.stop()

    asyncio.run(run())


def pseudonym(number: int) -> str:
    return f"harmonia-{number:016x}"


def test_via_round_trips() -> None:
    via = Via((pseudonym(1), pseudonym(2)), frozenset(map(pseudonym, (3, 4))))
    field = via.headers(pseudonym(5), [pseudonym(6), None])[VIA]
    names = " ".join(map(pseudonym, (3, 4, 6)))
    assert field == f"1.1 {pseudonym(1)}, 1.1 {pseudonym(2)}, 1.1 {pseudonym(5)} (asked {names})"
    assert Via.parse(field) == Via((*via.through, pseudonym(5)), via.asked | {pseudonym(6)})


@pytest.mark.parametrize(
    ("field", "through", "asked"),
    [
        ("", [], []),
        (f"1.0 fred, HTTP/1.1 {pseudonym(1)} , 2 cdn.test:443 (Varnish, 7)", [1], []),
        (f"1.1 {pseudonym(1)} (asked {pseudonym(2)}, {pseudonym(3)}),\t1.1 {pseudonym(4)}", [1, 4], [2, 3]),
        (f"1.1 {pseudonym(1)} (asked {pseudonym(2)}", [], []),
        (f"1.1 {pseudonym(1)}x, 1.1 x{pseudonym(1)}, {pseudonym(1)}, 1.1 {pseudonym(1)} {pseudonym(2)}", [], []),
        (f"1.1 x ({pseudonym(1)} ({pseudonym(2)})), 1.1 {pseudonym(3)}", [3], [2]),
    ],
)
def test_other_proxies_in_via_are_ignored(field: str, through: list[int], asked: list[int]) -> None:
    assert Via.parse(field) == Via(tuple(map(pseudonym, through)), frozenset(map(pseudonym, asked)))


def test_received_via_is_bounded() -> None:
    """Only a few names are kept, and the field we send can be parsed completely."""
    names = list(map(pseudonym, range(1000)))
    many = Via.parse(", ".join(f"1.1 {name}" for name in names))
    assert many.through == tuple(names[:8])
    asked = Via.parse(f"1.1 {names[0]} ({' '.join(names[:100])})")
    assert len(asked.asked) == 64
    assert Via.parse("1.1 x, " * 1000 + f"1.1 {names[0]}") == Via()
    longest = Via((*many.through[:7],), asked.asked).headers(pseudonym(5000), names)
    assert Via.parse(longest[VIA]).through == (*many.through[:7], pseudonym(5000))


def test_lookup_cache_is_bounded_and_evicts_the_least_recently_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup_cache, "_LOOKUPS_MAX_BYTES", 1 << 20)

    async def run() -> None:
        upstreams = UpstreamPool([], "us", 1, FailedNars())
        via = Via(("a", "b", "c"), frozenset(map(str, range(60))))
        await upstreams.lookup_path("used", via)
        tracemalloc.start()
        for number in range(5000):
            await upstreams.lookup_path(f"{number:032}", via)
            await upstreams.lookup_path("used", via)
        taken = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert taken < 1 << 20
        await upstreams.close()

    asyncio.run(run())


def real_client(url: str = "http://localhost") -> Client:
    counters = Metrics([], [], 1, [url], list(Reason)).own_upstream(url)
    settings = Upstream(url=url)
    transport = Transport(settings, None, ssl.create_default_context(), ProxyRules({}), counters)
    return Client(settings, transport, counters, "/nix/store", 1)


def test_answer_is_returned_or_discarded_if_the_caller_is_cancelled() -> None:
    async def run(steps: int) -> None:
        asked: list[str] = []
        discarded: list[str | None] = []

        async def ask(*_: object) -> str:
            asked.append("answer")
            return "answer"

        upstreams = UpstreamPool([real_client()], "us", 10, FailedNars())
        getting = asyncio.create_task(upstreams.first_answer(ask, Via(), discarded.append))
        for _ in range(steps):
            await asyncio.sleep(0)
        getting.cancel()
        (returned,) = await asyncio.gather(getting, return_exceptions=True)
        for _ in range(20):
            await asyncio.sleep(0)
        await upstreams.close()
        assert asked == discarded + [returned] * (returned == "answer")

    for steps in range(20):
        asyncio.run(run(steps))


def test_cancelled_caller_leaves_no_task_and_no_error() -> None:
    """The cancelled request may take a while to end."""

    async def run() -> None:
        errors: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        cancelled = asyncio.Event()

        async def ask(_: Part) -> Answer:
            try:
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0.01)
                cancelled.set()
            raise UpstreamError("it does not answer")

        client = real_client()
        reading = asyncio.ensure_future(anext(PassthroughBody(client, ask).read(0, None)))
        await asyncio.sleep(0.01)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(PATIENCE_S):
                await reading
        assert cancelled.is_set()
        gc.collect()
        assert not errors
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await client.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("base", "url", "here"),
    [
        ("http://cache.test/x", "http://CACHE.test:80/y?z", True),
        ("http://cache.test", "https://cache.test/y", True),
        ("http://cache.test:5000", "https://cache.test/y", True),
        ("http://cache.test:5000", "https://cache.test:5000/y", True),
        ("http://cache.test:5000", "https://cache.test:5001/y", False),
        ("http://cache.test", "https://other.test/y", False),
        ("http://cache.test", "http://cache.test:443/y", False),
        ("https://cache.test", "http://cache.test/y", False),
        ("https://cache.test:5000", "https://cache.test/y", False),
        ("http://cache.test", "https://[x/y", False),
    ],
)
def test_nar_url_on_https_of_the_same_host_is_accepted(base: str, url: str, *, here: bool) -> None:
    async def run() -> None:
        client = real_client(base)
        with nullcontext() if here else pytest.raises(UpstreamMismatchError):
            client.nar_url(url, "narinfo")  # an upstream without keys
        await client.close()

    asyncio.run(run())


@pytest.mark.parametrize("disk", ["fast", "slow"])
def test_nar_that_two_paths_share_is_fetched_ahead_once(
    disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"content" * 1000
    info = PathInfo(PATH, hashlib.sha256(content).digest(), len(content))
    nar = NarFile("x.nar", file_hash=info.nar_hash, file_size=len(content))

    if disk == "slow":
        monkeypatch.setattr(loop_reads, "monotonic", lambda: -math.inf)  # no read may run on the event loop yet

    async def run(url: str) -> list[int | None]:
        threads = Threads(cast("Any", None), cast("Any", None))
        client = real_client(url)
        client.breaker.start(PATIENCE_S)
        small = SmallNars(DiskCache(str(tmp_path)), None, threads)
        others = [replace(info, path=StorePath(f"{digit * 32}-x")) for digit in "01"]
        paths = [RemotePath(client, each, nar, verified=True, url=f"{url}/x.nar", narinfo_size=0) for each in others]
        try:
            return await asyncio.gather(*(small.fetch(path, {}) for path in paths))
        finally:
            await client.close()

    with UpstreamServer() as server:
        server.files["/x.nar"] = content
        assert asyncio.run(run(server.url)) == [len(content), 0]
        assert server.asked["GET /x.nar"] == 1

"""What an upstream sends is looked at piece by piece, and one that fails is left alone."""

import asyncio
import gc
import hashlib
import ssl
import time
import tracemalloc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest

from harmonia.config.proxy import ProxyRules
from harmonia.config.settings import Upstream
from harmonia.errors import FormatError, UpstreamError
from harmonia.metrics.shared_counters import Metrics
from harmonia.nix.narinfo import NarFile
from harmonia.nix.path_info import PathInfo
from harmonia.nix.store_path import StorePath
from harmonia.upstream import breaker, failed_nars, lookup, nar_verifier
from harmonia.upstream.answer import Answer
from harmonia.upstream.bodies import PassthroughBody
from harmonia.upstream.breaker import Breaker
from harmonia.upstream.client import Client
from harmonia.upstream.failed_nars import FailedNars
from harmonia.upstream.lookup import UpstreamPool
from harmonia.upstream.loop_guard import VIA, Via
from harmonia.upstream.nar_verifier import has_file_hash
from harmonia.upstream.refusals import Reason, UpstreamMismatchError
from harmonia.upstream.transport import Part, Transport
from support.packing import PACK

PATH = StorePath(f"{'0' * 32}-x")
CONTENT = b"content" * 100_000
INFO = PathInfo(PATH, hashlib.sha256(CONTENT).digest(), len(CONTENT))


def check(info: PathInfo, compression: str, file: bytes) -> None:
    nar_verifier.check_content(info, NarFile("x", compression), [file[:1000], file[1000:]])


@pytest.mark.parametrize("compression", sorted(PACK))
def test_a_nar_is_right_if_it_unpacks_to_its_nar_hash(compression: str) -> None:
    file = PACK[compression](CONTENT)
    check(INFO, compression, file)
    for wrong in (
        replace(INFO, nar_hash=bytes(32)),
        replace(INFO, nar_size=len(CONTENT) + 1),
        replace(INFO, nar_size=len(CONTENT) - 1),
    ):
        with pytest.raises(FormatError):
            check(wrong, compression, file)
    with pytest.raises(FormatError):
        check(INFO, compression, file[:-1])
    with pytest.raises(FormatError):
        check(INFO, compression, b"garbage" + file)


def test_a_file_hash_is_that_of_the_file_and_without_compression_of_the_nar() -> None:
    assert has_file_hash(INFO, NarFile("x", "xz", bytes(32)), bytes(32))
    assert not has_file_hash(INFO, NarFile("x", "xz", bytes(32)), bytes(31))
    assert not has_file_hash(INFO, NarFile("x", "xz"), bytes(32))
    assert has_file_hash(INFO, NarFile("x", "none", bytes(32)), INFO.nar_hash)
    assert not has_file_hash(INFO, NarFile("x", "none", bytes(32)), bytes(32))


def test_a_nar_that_could_not_be_had_is_remembered_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
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


class Probed:
    """What a breaker looks at."""

    def __init__(self, *, works: bool) -> None:
        self.works = works
        self.probes = 0
        self.states: list[str | None] = []
        """Why it was left alone, each time, or None where it was asked again."""

    async def probe(self) -> bool:
        self.probes += 1
        return self.works

    def breaker(self) -> Breaker:
        return Breaker(self.probe, self.states.append)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 (nothing tells of it)
            await asyncio.sleep(0.001)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(breaker, "LONGEST_DELAY", 0.02)


def test_a_breaker_closes_when_the_upstream_answers() -> None:
    async def run() -> None:
        upstream = Probed(works=False)
        tried = upstream.breaker()
        tried.start(10)
        assert not await tried.usable()
        upstream.works = True
        await until(lambda: tried.closed)
        assert upstream.states == [None]
        await tried.stop()

    asyncio.run(run())


def test_a_first_probe_that_hangs_is_not_waited_for() -> None:
    async def run() -> None:
        tried = Breaker(asyncio.Event().wait, lambda _: None)
        tried.start(0.01)
        async with asyncio.timeout(10):
            assert not await tried.usable()
        await tried.stop()

    asyncio.run(run())


def test_a_probe_that_fails_in_any_way_is_not_the_last(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        upstream = Probed(works=True)
        shortages = [RuntimeError("can't start new thread"), MemoryError()]

        async def probe() -> bool:
            if shortages:
                raise shortages.pop()
            return await upstream.probe()

        tried = Breaker(probe, upstream.states.append)
        tried.start(10)
        await until(lambda: tried.closed)
        await tried.stop()

    asyncio.run(run())
    assert [record.getMessage() for record in caplog.records] == ["cannot probe an upstream"] * 2


def test_a_breaker_opens_after_failures_in_a_row() -> None:
    async def run() -> None:
        upstream = Probed(works=True)
        tried = upstream.breaker()
        tried.start(10)
        assert await tried.usable()
        for _ in range(10):
            tried.failed("it is gone")
            tried.failed("it is gone")
            tried.succeeded()
        assert tried.closed
        upstream.works = False
        for _ in range(breaker.MAX_FAILURES):
            tried.failed("it is gone")
        assert not tried.closed
        before = upstream.probes
        await until(lambda: upstream.probes >= before + 3)
        assert not await tried.usable()
        upstream.works = True
        await until(lambda: tried.closed)
        assert upstream.states == [None, "it is gone", None]
        await tried.stop()

    asyncio.run(run())


def test_who_asks_to_be_left_alone_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "LONGEST_DELAY", 60)

    async def run() -> None:
        upstream = Probed(works=True)
        tried = upstream.breaker()
        tried.start(10)
        assert await tried.usable()
        tried.failed("it is busy", retry_after=30)
        assert not tried.closed
        await asyncio.sleep(0.05)
        assert upstream.probes == 1
        await tried.stop()

    asyncio.run(run())


def pseudonym(number: int) -> str:
    return f"harmonia-{number:016x}"


def test_via_is_parsed_as_it_is_written() -> None:
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
def test_other_proxies_in_via_are_left_out(field: str, through: list[int], asked: list[int]) -> None:
    assert Via.parse(field) == Via(tuple(map(pseudonym, through)), frozenset(map(pseudonym, asked)))


def test_received_via_is_bounded() -> None:
    """Whatever is received, a few names are kept, and what is sent on is read in whole."""
    names = list(map(pseudonym, range(1000)))
    many = Via.parse(", ".join(f"1.1 {name}" for name in names))
    assert many.through == tuple(names[:8])
    asked = Via.parse(f"1.1 {names[0]} ({' '.join(names[:100])})")
    assert len(asked.asked) == 64
    assert Via.parse("1.1 x, " * 1000 + f"1.1 {names[0]}") == Via()
    longest = Via((*many.through[:7],), asked.asked).headers(pseudonym(5000), names)
    assert Via.parse(longest[VIA]).through == (*many.through[:7], pseudonym(5000))


def test_what_is_remembered_takes_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is used stays, what was used longest ago goes."""
    monkeypatch.setattr(lookup, "_LOOKUPS_MAX_BYTES", 1 << 20)

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


def test_an_answer_is_either_given_or_discarded_whenever_who_asked_goes_away() -> None:
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
        (given,) = await asyncio.gather(getting, return_exceptions=True)
        for _ in range(20):
            await asyncio.sleep(0)
        await upstreams.close()
        assert asked == discarded + [given] * (given == "answer")

    for steps in range(20):
        asyncio.run(run(steps))


def test_who_goes_away_while_an_upstream_is_asked_leaves_nothing_behind() -> None:
    """No complaint and no task, also where it takes a while to give that up."""

    async def run() -> None:
        complaints: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        given_up = asyncio.Event()

        async def ask(_: Part) -> Answer:
            try:
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0.01)
                given_up.set()
            raise UpstreamError("it does not answer")

        client = real_client()
        reading = asyncio.ensure_future(anext(PassthroughBody(client, ask).read(0, None)))
        await asyncio.sleep(0.01)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(reading, 10)
        assert given_up.is_set()
        gc.collect()
        assert not complaints
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
def test_https_of_its_host_is_the_upstream_itself(base: str, url: str, *, here: bool) -> None:
    async def run() -> None:
        client = real_client(base)
        with nullcontext() if here else pytest.raises(UpstreamMismatchError):
            client.nar_url(url, "narinfo")  # of an upstream without keys
        await client.close()

    asyncio.run(run())

"""What an upstream sends is looked at piece by piece, and one that fails is left alone."""

import asyncio
import bz2
import gc
import gzip
import hashlib
import lzma
import ssl
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import aiohttp
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from harmonia.config.proxy import ProxyRules
from harmonia.config.settings import Upstream
from harmonia.errors import UpstreamError
from harmonia.metrics.shared_counters import Metrics
from harmonia.nix.narinfo import NarFile
from harmonia.nix.path_info import PathInfo
from harmonia.nix.store_path import StorePath
from harmonia.upstream import breaker, lookup_cache
from harmonia.upstream.breaker import Breaker
from harmonia.upstream.client import Client
from harmonia.upstream.lookup import Upstreams
from harmonia.upstream.loop_guard import Hops
from harmonia.upstream.nar_verifier import check_content, check_file, conclusive, unpack
from harmonia.upstream.passthrough_body import Passed
from harmonia.upstream.transport import Part, Transport

PACK: dict[str, Callable[[bytes], bytes]] = {
    "none": bytes,
    "xz": lzma.compress,
    "bzip2": bz2.compress,
    "gzip": gzip.compress,
    "zstd": zstandard.ZstdCompressor().compress,
}
PATH = StorePath(f"{'0' * 32}-x")


def info(content: bytes) -> PathInfo:
    return PathInfo(PATH, hashlib.sha256(content).digest(), len(content))


def check(path: PathInfo, nar: NarFile, file: bytes, *cuts: int) -> None:
    places = sorted({min(cut, len(file)) for cut in cuts})
    check_file(path, nar, hashlib.sha256(file).digest(), len(file))
    check_content(path, nar, (file[start:stop] for start, stop in pairwise([0, *places, len(file)])))


contents = st.binary(min_size=1, max_size=300) | st.binary(min_size=1, max_size=9).map(lambda data: data * 50_000)


@given(st.sampled_from(sorted(PACK)), st.lists(contents, min_size=1, max_size=3), st.lists(st.integers(0, 2000)))
def test_what_is_right_is_so_however_it_comes(compression: str, parts: list[bytes], cuts: list[int]) -> None:
    """Also of several streams, one after the other."""
    file = b"".join(map(PACK[compression], parts))
    path = info(b"".join(parts))
    file_hash = hashlib.sha256(file).digest()
    check(path, NarFile("x", compression, file_hash), file, *cuts)
    check(path, NarFile("x", compression), file, *cuts)
    with pytest.raises(UpstreamError):
        check(replace(path, nar_hash=bytes(32)), NarFile("x", compression, file_hash), file, *cuts)
    with pytest.raises(UpstreamError):
        check(replace(path, nar_size=path.nar_size + 1), NarFile("x", compression, file_hash), file, *cuts)
    with pytest.raises(UpstreamError):
        check(path, NarFile("x", compression, bytes(32)), file, *cuts)


@given(st.sampled_from(sorted(PACK)), contents, st.data())
def test_what_is_cut_short_or_damaged_is_wrong(compression: str, content: bytes, data: st.DataObject) -> None:
    file = bytearray(PACK[compression](content))
    cut = data.draw(st.integers(0, len(file) - 1))
    path, nar = info(content), NarFile("x", compression, hashlib.sha256(file).digest())
    with pytest.raises(UpstreamError):
        check(path, nar, bytes(file[:cut]))
    file[cut] ^= 1
    with pytest.raises(UpstreamError):
        check(path, nar, bytes(file))


def test_only_a_file_hash_can_tell_of_an_unknown_compression() -> None:
    path = info(b"content")
    assert not conclusive(NarFile("x", "br"))
    assert conclusive(NarFile("x", "br", hashlib.sha256(b"packed").digest()))
    assert conclusive(NarFile("x", "xz"))
    check(path, NarFile("x", "br", hashlib.sha256(b"packed").digest()), b"packed")


@pytest.mark.parametrize("compression", sorted(PACK.keys() - {"none"}))
def test_a_bomb_takes_little_memory(compression: str) -> None:
    bomb = PACK[compression](bytes(256 << 20) if compression == "zstd" else bytes(32 << 20))
    tracemalloc.start()
    with pytest.raises(UpstreamError, match="NarSize"):
        check_content(info(b"x" * 100), NarFile("x", compression), [bomb])
    with pytest.raises(UpstreamError, match="large"):
        unpack(bomb, compression, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 70 << 20


@pytest.mark.parametrize("encoding", ["br", "compress", "gzip"])
def test_a_body_that_is_not_what_it_says_is_none(encoding: str) -> None:
    with pytest.raises(UpstreamError):
        unpack(b"neither", encoding, 1000)


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
    assert [record.getMessage() for record in caplog.records] == ["an upstream cannot be probed"] * 2


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
        for _ in range(breaker.FAILURES):
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


def test_hops_are_read_as_they_are_written() -> None:
    hops = Hops.parse("a, b", "c,, d ,")
    assert hops == Hops(("a", "b"), frozenset("cd"))
    headers = hops.headers("us", [])
    assert Hops.parse(headers["Harmonia-Hops"], headers["Harmonia-Asked"]) == Hops(("a", "b", "us"), frozenset("cd"))


def test_what_clients_say_of_hops_is_cut_short() -> None:
    hops = Hops.parse("a" * 1000 + ", b" * 1000, ", ".join(map(str, range(10_000))))
    assert len(hops.through) == 8
    assert len(hops.asked) == 64
    assert max(map(len, hops.through)) == 32


def test_what_is_remembered_takes_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is used stays, what was used longest ago goes."""
    monkeypatch.setattr(lookup_cache, "_SIZE", 1 << 20)

    async def run() -> None:
        upstreams = Upstreams([], "us", 1)
        hops = Hops.parse("a, b, c", ",".join(map(str, range(60))))
        await upstreams.find("used", hops)
        tracemalloc.start()
        for number in range(5000):
            await upstreams.find(f"{number:032}", hops)
            await upstreams.find("used", hops)
        taken = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert taken < 1 << 20
        await upstreams.close()

    asyncio.run(run())


def real_client() -> Client:
    url = "http://localhost"
    counters = Metrics([], [], 1, [url]).own_upstream(url)
    settings = Upstream(url=url)
    return Client(
        settings, Transport(settings, None, ssl.create_default_context(), ProxyRules({})), counters, "/nix/store", 1
    )


def test_an_answer_is_either_given_or_discarded_whenever_who_asked_goes_away() -> None:
    async def run(steps: int) -> None:
        asked: list[str] = []
        discarded: list[str | None] = []

        async def ask(*_: object) -> str:
            asked.append("answer")
            return "answer"

        upstreams = Upstreams([real_client()], "us", 10)
        getting = asyncio.create_task(upstreams.get(ask, Hops(), discarded.append))
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
    """Also where it takes a while to give that up."""

    async def run() -> None:
        complaints: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        given_up = asyncio.Event()

        async def ask(_: Part) -> aiohttp.ClientResponse:
            try:
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0.01)
                given_up.set()
            raise UpstreamError("it does not answer")

        client = real_client()
        reading = Passed(client, ask).read(0, None)
        next(reading)
        await asyncio.sleep(0.01)
        reading.close()
        await asyncio.wait_for(given_up.wait(), 10)
        await asyncio.sleep(0.01)
        gc.collect()
        assert not complaints
        await client.close()

    asyncio.run(run())


@pytest.mark.parametrize("empty", [bz2.compress(b""), gzip.compress(b"")], ids=["bzip2", "gzip"])
def test_many_streams_take_no_more_time_than_one_after_the_other(empty: bytes) -> None:
    encoding = "bzip2" if empty.startswith(b"BZ") else "gzip"
    taken = []
    for size in (1 << 18, 1 << 21):
        began = time.process_time()
        assert unpack(empty * (size // len(empty)), encoding, size) == b""
        taken.append(time.process_time() - began)
    assert taken[1] < 20 * taken[0]

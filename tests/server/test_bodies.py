"""Every kind of body releases everything, however and at whichever chunk its response ends.

That covers open files, locks, temporary roots, responses of upstreams, tasks and jobs of threads.
"""

import asyncio
import bz2
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self, cast
from unittest.mock import patch

import pytest
from multidict import CIMultiDict
from sanic import HTTPResponse, Request
from sanic.exceptions import SanicException

from harmonia.cache.disk_cache import DiskCache
from harmonia.cache.growing_file import CachedFile
from harmonia.cache.layout_cache import Layouts
from harmonia.cache.nar_compressor import CachedNar, CompressedNar, Compressor
from harmonia.cache.zstd_frames import Compressed
from harmonia.cache.zstd_stored import StoredNar
from harmonia.config.tables.zstd import Zstd
from harmonia.nix.store_path import StorePath
from harmonia.ownership import hand_over
from harmonia.process.loop_reads import LoopReads
from harmonia.process.loop_turns import LoopTurns
from harmonia.server.http import response
from harmonia.server.http.response import Body, Deferred, Representation
from harmonia.server.made_once import MadeFile
from harmonia.store import build_log, object_files
from harmonia.store.store_nar import StoreNar
from harmonia.store.temp_roots import TempRootLease, TempRoots
from harmonia.tools.store_builder import StoreBuilder
from harmonia.upstream.answer import Answer
from harmonia.upstream.bodies import CachedBody, PassthroughBody
from support.compression import compressing
from support.disk_cache import at, fill, filling

if TYPE_CHECKING:
    from harmonia.upstream.client import Client

CONTENT = os.urandom(600_000)
"""Content of several chunks, blocks and frames."""
LOG = CONTENT[:300_000]
FRAME_BYTES = 250_000


class UnexpectedError(Exception):
    """An error of a class that no code expects."""


class Way:
    """A way in which a response ends at step `at`, unless it has ended before."""

    def __init__(self, name: str, at: int) -> None:
        self.name = name
        self._left = at
        self.task: asyncio.Task[Any]

    @property
    def happened(self) -> bool:
        return self._left < 0

    def happens_now(self, name: str) -> bool:
        if self.name != name:
            return False
        self._left -= 1
        return self._left == -1


WAYS = ["reading fails", "sending fails", "cancelled while reading", "cancelled while sending", "the head fails"]


class Upstream:
    """An upstream that sends the content in pieces, together with its `Client`."""

    def __init__(self, way: Way) -> None:
        self._way = way
        self.open = 0

    async def ask(self, part: tuple[int, int | None]) -> Answer:
        return cast("Answer", _Answer(self, CONTENT[slice(*part)], whole=part == (0, None)))

    async def read_answer(self, answer: "_Answer", most: int) -> bytes:
        if self._way.happens_now("reading fails"):
            raise UnexpectedError
        if self._way.happens_now("cancelled while reading"):
            self._way.task.cancel()
        await asyncio.sleep(0)
        data, answer.rest = answer.rest[:most], answer.rest[most:]
        return data


class _Answer:
    is_encoded = False
    content_length = len(CONTENT)

    def __init__(self, upstream: Upstream, content: bytes, *, whole: bool) -> None:
        self.rest = content
        self.status = HTTPStatus.OK if whole else HTTPStatus.PARTIAL_CONTENT
        self._upstream = upstream
        self._is_open = True
        upstream.open += 1

    def close(self) -> None:
        self._upstream.open -= self._is_open
        self._is_open = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


class Roots(TempRoots):
    """Temporary roots that record their leases."""

    def __init__(self, socket: Path) -> None:
        super().__init__(str(socket), "/nix/store", expected=False)
        self.leases: list[TempRootLease] = []

    def acquire(self, path: StorePath) -> TempRootLease:
        self.leases.append(super().acquire(path))
        return self.leases[-1]


class Bench:
    """The parts that bodies are made of, and a check for leftovers."""

    def __init__(self, directory: Path, cache: DiskCache) -> None:
        self.directory = directory
        self.cache = cache
        self._threads = ThreadPoolExecutor(2)
        builder = StoreBuilder(directory / "store")
        self.info = builder.add(builder.output_path("a"), {"large": CONTENT, "small": b"x" * 1000})
        self.root = builder.real_path(self.info.path)
        self.logs = directory / "logs"
        self.derivation = StorePath(f"{'0' * 32}-a.drv")
        for name, suffix in (("plain", ""), ("bz2", ".bz2")):
            path = self.logs / name / "drvs" / (self.derivation + suffix)
            path.parent.mkdir(parents=True)
            path.write_bytes(bz2.compress(LOG) if suffix else LOG)
        self.layouts = Layouts(1 << 20)
        self.roots = Roots(directory / "socket")

    def begin(self, way: Way) -> None:
        """Forget all earlier responses."""
        self.way, self.upstream = way, Upstream(way)
        self.roots.leases.clear()
        self.jobs: list[Future[Any]] = []
        for name in os.listdir(self.cache.path("")):
            self.cache.remove(name)
        self.compressor = Compressor(Zstd(), self.cache)

    def nar(self) -> StoreNar:
        return StoreNar(self.info, self.root, self.layouts, self.roots.acquire(self.info.path))

    def submit(self, function: Callable[..., Any], *arguments: object) -> "Future[Any]":
        fails, cancels = self.way.happens_now("reading fails"), self.way.happens_now("cancelled while reading")
        loop, task = asyncio.get_running_loop(), self.way.task

        def job() -> object:
            if fails:
                raise UnexpectedError
            if cancels:
                loop.call_soon_threadsafe(task.cancel)
            return function(*arguments)

        self.jobs.append(self._threads.submit(job))
        return self.jobs[-1]

    def left(self) -> dict[str, object]:
        """Return the leftovers of a response that has ended."""
        return {
            "jobs": [job for job in self.jobs if not job.done()],
            "temporary roots": [lease.path for lease in self.roots.leases if not lease.is_released],
            "answers of upstreams": self.upstream.open,
            "growing files": [name for name in os.listdir(self.cache.path("")) if name.endswith(".growing")],
            "open files": self._open_files(),
        }

    def _open_files(self) -> list[str]:
        names = []
        for number in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):  # closed meanwhile
                names.append(os.readlink(f"/proc/self/fd/{number}"))
        return [name for name in names if name.startswith(str(self.directory))]

    def close(self) -> None:
        self.roots.close()
        self._threads.shutdown()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    directory = tmp_path_factory.mktemp("bodies")
    with at(directory / "cache") as cache, compressing(cache, frame_size=FRAME_BYTES):
        bench = Bench(directory, cache)
        yield bench
        bench.close()


Make = Callable[[Bench], Body]


def log(name: str) -> Make:
    return lambda bench: cast("Body", build_log.find_log(str(bench.logs / name), bench.derivation))


def file(bench: Bench) -> object_files.File:
    status = os.stat(os.path.join(bench.root, b"large"))
    return object_files.File(bench.root, [b"large"], status)


def passed(bench: Bench) -> PassthroughBody:
    return PassthroughBody(cast("Client", bench.upstream), bench.upstream.ask)


def cached(bench: Bench) -> CachedFile:
    fill(bench.cache, content=CONTENT)
    return cast("CachedFile", bench.cache.find_file("key"))


def abandoned(bench: Bench) -> CachedBody:
    """Return a NAR of an upstream whose cached file ends too early."""
    reader, filler = filling(bench.cache)
    filler.append(CONTENT[:400_000])
    filler.abandon()
    return CachedBody(reader, bench.submit, None, None, passed(bench))


def compressed(bench: Bench) -> CompressedNar:
    return CompressedNar(bench.compressor, bench.nar())


def compressed_before(bench: Bench) -> CompressedNar:
    compressed(bench).close()
    return compressed(bench)


def compressed_without_cache(bench: Bench) -> CompressedNar:
    bench.compressor.cache = None
    return compressed(bench)


OPENED: dict[str, Make] = {
    "NAR": Bench.nar,
    "NAR in the encoding of another server": lambda bench: CachedNar(cached(bench)),
    "file": file,
    "plain log": log("plain"),
    "listing": lambda bench: MadeFile(cached(bench)),
    "cached NAR of an upstream": lambda bench: CachedBody(cached(bench), bench.submit),
}
"""Bodies that are already open when the response begins."""

UNSIZED: dict[str, Make] = {
    "compressed NAR": compressed,
    "compressed NAR, without a cache": compressed_without_cache,
    "bz2 log": log("bz2"),
    "passed through": passed,
    "passed through after a cached file": abandoned,
}
"""Bodies behind `Deferred`, with a length that is unknown until they are complete."""

DEFERRED: dict[str, Make] = UNSIZED | {
    "compressed NAR, cached": compressed_before,
    "stored NAR": lambda bench: StoredNar(bench.compressor, bench.nar(), bench.compressor.encoder.encoding),
    "file, compressed": lambda bench: Compressed(bench.compressor.encoder, file(bench)),
}
"""Bodies that a thread opens while the response is made."""

RANGES = ["bytes=1000-", "bytes=1000-1999", "bytes=-1000"]


def request(way: Way, method: str = "GET", headers: dict[str, str] | None = None) -> Request:
    async def begin(_: object) -> None:
        if way.happens_now("the head fails"):
            raise UnexpectedError
        asked.responded = True

    asked = SimpleNamespace(
        method=method, version="1.1", path="/", headers=CIMultiDict(headers or {}), ctx=SimpleNamespace(),
        app=SimpleNamespace(ctx=SimpleNamespace(loop_turns=LoopTurns(), client=lambda _: "")),
        responded=False, respond=begin, transport=SimpleNamespace(abort=lambda: None),
    )  # fmt: skip
    return cast("Request", asked)


@contextmanager
def sending(way: Way, sent: bytearray) -> Iterator[None]:
    async def send(_: HTTPResponse, data: bytes) -> None:
        if way.happens_now("sending fails"):
            raise UnexpectedError
        if way.happens_now("cancelled while sending"):
            way.task.cancel()
        await asyncio.sleep(0)
        sent.extend(data)

    with patch.object(HTTPResponse, "send", send):
        yield


async def answer(bench: Bench, kind: str, **asked: Any) -> bytes:
    """Answer a request with a body; return the sent bytes."""
    bench.way.task = cast("asyncio.Task[Any]", asyncio.current_task())
    sent = bytearray()

    async def open_body(_: Request) -> Body:
        return await hand_over(bench.submit(DEFERRED[kind], bench))

    body = Deferred(open_body) if kind in DEFERRED else OPENED[kind](bench)
    representation = Representation(content_type="x", body=body, cache_control="x", etag='"x"')
    with sending(bench.way, sent), patch.object(response, "_LENGTH_WAIT_S", 0), suppress(UnexpectedError):
        await response.respond(request(bench.way, **asked), representation, bench.submit)
    return bytes(sent)


NOTHING = {"jobs": [], "temporary roots": [], "answers of upstreams": 0, "growing files": [], "open files": []}


async def run(bench: Bench, kind: str, way: Way, **asked: Any) -> bytes:
    bench.begin(way)
    task = asyncio.create_task(answer(bench, kind, **asked))
    await asyncio.wait({task})
    # Filling the cache, or opening for a client that has left, continues in threads, some of which have a low priority.
    # Tasks that wait for a thread end a moment after its job.
    for _ in range(30_000):
        if bench.left() == NOTHING and len(asyncio.all_tasks()) == 1:
            break
        await asyncio.sleep(0.002)
    assert bench.left() == NOTHING
    assert asyncio.all_tasks() == {asyncio.current_task()}
    return b"" if task.cancelled() else task.result()


async def end_everywhere(bench: Bench, kind: str, way: str, **asked: Any) -> None:
    """End a response at its first step, at its second, and so on, until it completes."""
    for step in range(1000):
        ends = Way(way, step)
        await run(bench, kind, ends, **asked)
        if not ends.happened:
            assert step, "the response never reached this step"
            return
    raise AssertionError("the response never completed")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [*OPENED, *DEFERRED])
def test_response_that_ends_at_any_step_leaks_nothing(
    bench: Bench, kind: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoopReads, "allowed", False)  # read in threads
    asyncio.run(end_everywhere(bench, kind, way))


@pytest.mark.parametrize("way", ["sending fails", "cancelled while sending", "the head fails"])
@pytest.mark.parametrize("kind", ["NAR", "compressed NAR, cached"])
def test_response_read_on_the_event_loop_leaks_nothing(bench: Bench, kind: str, way: str) -> None:
    asyncio.run(end_everywhere(bench, kind, way))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("byte_range", RANGES)
@pytest.mark.parametrize("kind", UNSIZED)
def test_range_of_unknown_length_that_ends_at_any_step_leaks_nothing(
    bench: Bench, kind: str, byte_range: str, way: str
) -> None:
    asyncio.run(end_everywhere(bench, kind, way, headers={"range": byte_range}))


@pytest.mark.parametrize(
    ("method", "headers"), [("GET", {}), ("HEAD", {}), ("GET", {"if-none-match": "*"}), ("GET", {"if-match": '"y"'})]
)
@pytest.mark.parametrize("kind", [*OPENED, *DEFERRED])
def test_sent_or_unsent_body_leaks_nothing(bench: Bench, kind: str, method: str, headers: dict[str, str]) -> None:
    with suppress(SanicException):
        sent = asyncio.run(run(bench, kind, Way("", 0), method=method, headers=headers))
        assert bool(sent) == (method == "GET" and not headers)

"""A NAR that fits into memory is read on the event loop, compressed once at a time, and kept if requested again."""

import asyncio
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from harmonia.nix.path_info import PathInfo
from harmonia.process import loop_reads
from harmonia.process.fair_executor import FairExecutor
from harmonia.process.loop_reads import LoopReads
from harmonia.process.loop_turns import LoopTurns
from harmonia.server.context import ServerContext
from harmonia.tools.store_builder import StoreBuilder
from support.held_compression import held_by
from support.nars import reference
from support.running import NO_SMALL_NARS, Answer, Server, file_url, nar_url, unpacked, wait_until
from support.strategies import Regular, Tree, write_tree

Start = Callable[..., Server]


def run_in_steps(steps: Generator[None, None, str], loop_io: LoopReads) -> str:
    threads = SimpleNamespace(loop_io=loop_io, bodies=FairExecutor(1, 1, "body"))
    context = cast("ServerContext", SimpleNamespace(threads=threads, loop_turns=LoopTurns()))
    return asyncio.run(ServerContext.run_in_steps(context, "client", steps))


def threads_of_steps(seconds: list[float], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run steps that take so many seconds each. Return the name of the thread of each step."""
    names: list[str] = []
    now = 100.0
    monkeypatch.setattr(loop_reads, "monotonic", lambda: now)
    monkeypatch.setattr(loop_reads, "perf_counter", lambda: now)
    # Otherwise, a step during which this thread loses its processor would not count as one that waited.
    monkeypatch.setattr(loop_reads, "getrusage", lambda _: SimpleNamespace(ru_inblock=0, ru_nivcsw=0))

    def steps() -> Generator[None, None, str]:
        nonlocal now
        for step in seconds:
            now += step
            names.append(threading.current_thread().name.partition("_")[0])
            yield
        return "result"

    assert run_in_steps(steps(), LoopReads()) == "result"
    return names


def test_reads_from_memory_run_on_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    assert threads_of_steps([0.0004] * 10, monkeypatch) == ["MainThread"] * 10


def test_reads_continue_in_a_thread_after_one_that_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    assert threads_of_steps([0.0004, 0.03, 0.0004, 0.0004], monkeypatch) == ["MainThread"] * 2 + ["body"] * 2


def test_other_tasks_run_between_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoopReads, "allowed", True)  # even if a step takes long on a busy machine
    order: list[str] = []

    def steps(name: str) -> Generator[None, None, str]:
        for _ in range(3):
            order.append(name)
            until = time.perf_counter() + 0.002
            while time.perf_counter() < until:
                pass
            yield
        return name

    async def both() -> None:
        context = cast(
            "ServerContext", SimpleNamespace(threads=SimpleNamespace(loop_io=LoopReads()), loop_turns=LoopTurns())
        )
        await asyncio.gather(*(ServerContext.run_in_steps(context, name, steps(name)) for name in "ab"))

    asyncio.run(both())
    assert order != sorted(order)


@pytest.fixture
def held(start: Start, store: StoreBuilder, tmp_path: Path) -> Server:
    """Return a server of `store` that logs requests and compressions of small NARs, and compresses without `gate`."""
    logging = """
import logging
from harmonia.cache.nar_compressor import Compressor
from harmonia.process.loop_reads import LoopReads
from harmonia.process.single_flight import SingleFlight
from harmonia.server.context import ServerContext
compress_small = Compressor.compress_small
def compressing(self, source, content):
    logging.getLogger("harmonia").error("compresses what %s reads", "a thread" if content is None else "the loop")
    return compress_small(self, source, content)
class LoggedFlight(SingleFlight):
    def start(self, key, begin):
        run = super().start(key, begin)
        logging.getLogger("harmonia").error("joins")
        return run
init = ServerContext.__init__
def initialise(self, *arguments):
    init(self, *arguments)
    self.small_nars = LoggedFlight()
Compressor.compress_small, ServerContext.__init__ = compressing, initialise
LoopReads.allowed = True  # even if a read takes long on a busy machine
"""
    return start(store=Path(store.real_dir).parents[1], program=held_by(tmp_path / "gate", patch=logging))


def requested_at_once(server: Server, gate: Path, paths: Sequence[PathInfo]) -> list[Answer]:
    """Request paths while none of them is compressed. Return the responses."""
    with ThreadPoolExecutor(len(paths)) as clients:
        answers = [clients.submit(server.get, file_url(path)) for path in paths]
        wait_until(lambda: sum(line.endswith(" joins\n") for line in server.log) == len(paths))
        gate.unlink()
        return [answer.result() for answer in answers]


def compressions(server: Server) -> Counter[str]:
    """Return the number of compressions by the reader of the NAR."""
    return Counter(match[1] for line in server.log if (match := re.search("compresses what (.*) reads", line)))


def test_requests_at_the_same_time_compress_a_small_nar_once(held: Server, store: StoreBuilder, tmp_path: Path) -> None:
    path = store.add(store.output_path("path"), b"content" * 1000)
    answers = requested_at_once(held, tmp_path / "gate", [path] * 10)
    assert len({answer.body for answer in answers}) == 1
    assert compressions(held) == {"the loop": 1}


def test_few_nars_wait_in_memory_for_their_compression(held: Server, store: StoreBuilder, tmp_path: Path) -> None:
    paths = [store.add(store.output_path(f"path-{number}"), b"content" * number) for number in range(30)]
    answers = requested_at_once(held, tmp_path / "gate", paths)
    assert all(len(unpacked(answer.body)) == path.nar_size for answer, path in zip(answers, paths, strict=True))
    assert compressions(held) == {"the loop": 16, "a thread": 14}


def test_small_nar_is_written_to_the_cache_when_it_is_compressed_again(
    start: Start, store: StoreBuilder, tmp_path: Path
) -> None:
    tree: Tree = {b"a": Regular(70_000), b"b": {b"c": Regular(70_000)}}
    write_tree(tree, bytes(tmp_path / "tree"))
    path = store.add(store.output_path("path"), tmp_path / "tree")
    server = start(store=tmp_path / "store", program=NO_SMALL_NARS)
    cache = server.cache_dir / "nar"
    answers = []
    for number, files in enumerate((0, 1, 1)):  # other words each time, so that no response is repeated from memory
        answers.append(server.get(file_url(path), {"X-Number": str(number)}))
        assert len(list(cache.iterdir())) == files
    assert [unpacked(answer.body) for answer in answers] == [reference(tree)] * 3
    assert len({answer.body for answer in answers}) == 1
    metrics = server.get("/metrics").text
    assert "harmonia_cache_fills_total 1.0\n" in metrics
    assert "harmonia_cache_hits_total 1.0\n" in metrics


def test_all_kinds_of_clients_share_a_small_nar_in_memory(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    path = store.add(store.output_path("path"), b"content" * 1000)
    server = start(store=tmp_path / "store", settings="access_log = true")
    bodies = {server.get(file_url(path), {"X-Number": str(number)}).body for number in range(4)}
    bodies.add(server.get(nar_url(path), {"Accept-Encoding": "zstd"}).body)
    assert len(bodies) == 1
    assert len(list((server.cache_dir / "nar").iterdir())) == 0
    server.stop()
    found = [match[1] for line in server.log if (match := re.search(r"GET /nar/.* outcome=(\S+)", line))]
    assert found == ["compressed", *["memory"] * 4]


def test_narinfo_has_the_file_size_after_the_first_download(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    path = store.add(store.output_path("path"), b"content" * 1000)
    server = start(store=tmp_path / "store")
    size = len(server.get(file_url(path)).body)
    assert f"FileSize: {size}\n" in server.get(f"/{path.path.hash_part}.narinfo").text


@pytest.mark.parametrize("url", [nar_url, file_url])
def test_small_nar_that_grew_gets_404(
    start: Start, store: StoreBuilder, tmp_path: Path, url: Callable[..., str]
) -> None:
    path = store.add(store.output_path("path"), {"file": b"content"})
    file = Path(store.real_dir, str(path.path), "file")
    file.chmod(0o644)
    file.write_bytes(bytes(10_000_000))
    server = start(store=tmp_path / "store")
    assert server.get(url(path)).status == 404
    server.wait_for_log("is larger than the registered NAR")

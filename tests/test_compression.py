"""Compressed NARs: always the same bytes, from any source of them, and never complete if the content is falsify."""

import errno
import fcntl
import hashlib
import io
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from harmonia.cache import zstd
from harmonia.cache.compressed_files import CompressedFile
from harmonia.cache.disk_cache import DiskCache
from harmonia.cache.growing_file import Filler
from harmonia.cache.nar_compressor import CompressedNar, Compressor
from harmonia.cache.zstd import Encoding
from harmonia.cache.zstd_frames import Compressed
from harmonia.config.tables.zstd import Zstd
from harmonia.errors import CacheFileError, StoreObjectError
from harmonia.nix import base32
from harmonia.store.file_reader import END
from support.compression import (
    FRAME,
    Memory,
    compressing,
    everything,
    nar,
    plain,
    read,
    reading,
    reference,
)
from support.disk_cache import at, fill, filling, messages, no_leak, without
from support.programs import needs
from support.running import PATIENCE_S, wait_until
from support.small_disk import mounted

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _no_leak() -> Iterator[None]:
    with no_leak():
        yield


def decompress(data: bytes) -> bytes:
    with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data), read_across_frames=True) as reader:
        return reader.read()


def frames(data: bytes) -> Iterator[tuple[zstandard.FrameParameters, bytes]]:
    while data:
        decompressor = zstandard.ZstdDecompressor().decompressobj()
        yield zstandard.get_frame_parameters(data), decompressor.decompress(data)
        data = decompressor.unused_data


# Encoding


contents = st.binary(max_size=200) | st.builds(
    lambda part, times: part * times, st.binary(min_size=1, max_size=50), st.integers(1, 100)
)


@settings(max_examples=60)
@given(contents, st.integers(1, 5000), st.integers(1, 4))
@example(b"", 100, 2)
@example(bytes(300), 100, 4)
def test_compressed_bytes_are_the_same_for_any_threads_and_cache(content: bytes, frame_size: int, threads: int) -> None:
    """Any number of threads, with and without a cache, gives the same bytes, which decompress to the content."""
    frame_size = max(frame_size, len(content) // 50)
    source = Memory(content, hashlib.sha256(content).digest())
    expected = reference(source, frame_size)
    assert decompress(expected) == content
    with tempfile.TemporaryDirectory() as directory, at(directory) as cache:
        with compressing(cache, threads=threads, frame_size=frame_size) as compressor:
            assert read(compressor, source) == expected  # while the file grows
            assert read(compressor, source) == expected
        with compressing(threads=threads, frame_size=frame_size) as compressor:
            assert read(compressor, source) == expected
            assert everything(plain(Compressed(compressor.encoder, Memory(content)).read(0, None))) == expected


def test_frames_finished_out_of_order_are_written_in_order(tmp_path: Path) -> None:
    chance = random.Random(1)
    source = nar(before=lambda _: time.sleep(chance.random() / 100))
    with at(tmp_path) as cache, compressing(cache, threads=8) as compressor:
        assert read(compressor, source) == reference(source)


def test_every_frame_has_its_length_and_a_checksum() -> None:
    source = nar()
    with compressing() as compressor:
        parts = list(frames(read(compressor, source)))
    assert [parameters.content_size for parameters, _ in parts] == [FRAME] * 10 + [1]
    assert all(parameters.has_checksum for parameters, _ in parts)
    assert b"".join(content for _, content in parts) == source.content


@needs("zstd")
def test_zstd_command_decompresses_the_file() -> None:
    source = nar()
    with compressing() as compressor:
        data = read(compressor, source)
    assert subprocess.run(["zstd", "-dc"], input=data, stdout=subprocess.PIPE, check=True).stdout == source.content


def test_another_process_makes_the_same_bytes() -> None:
    code = """
import hashlib, random
from harmonia.config.tables.zstd import Zstd
from harmonia.cache.zstd import Encoding
data = random.Random(2).randbytes(5000) * 3
print(hashlib.sha256(Encoding.of(Zstd()).compress(data)).hexdigest())
"""
    data = random.Random(2).randbytes(5000) * 3
    here = hashlib.sha256(Encoding.of(Zstd()).compress(data)).hexdigest()
    for seed in "12":
        environment = os.environ | {"PYTHONHASHSEED": seed}
        answer = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, check=True)
        assert answer.stdout.decode().strip() == here


def window(options: Zstd) -> int:
    """Return the window of a frame of the maximum size."""
    encoding = Encoding.of(options)
    return zstandard.get_frame_parameters(encoding.compress(bytes(encoding.frame_size))).window_size


@pytest.mark.parametrize(("level", "log"), [(-7, 19), (0, 21), (1, 19), (2, 20), (3, 21), (12, 22), (19, 23), (22, 23)])
def test_window_follows_the_level_and_fits_all_decoders(level: int, log: int) -> None:
    assert window(Zstd(level=level)) == 1 << log


@pytest.mark.parametrize(
    ("options", "log"),
    [
        (Zstd(window_log=10), 10),
        (Zstd(level=22, window_log=20), 20),
        (Zstd(long_distance_matching=True), 25),
        (Zstd(long_distance_matching=True, window_log=24), 24),
        (Zstd(window_log=27), 27),
    ],
)
def test_window_follows_the_settings(options: Zstd, log: int) -> None:
    assert window(options) == 1 << log


def test_every_encoding_has_its_own_name() -> None:
    library = ".".join(map(str, zstandard.ZSTD_VERSION))
    names = [
        Encoding.of(Zstd(level=level, window_log=log, long_distance_matching=ldm)).name
        for level in (-1, 1, 3)
        for log in (0, 23, 26)
        for ldm in (False, True)
    ]
    assert len(set(names)) == len(names)
    assert all(name.startswith(f"zstd-{library}-") for name in names)


# Ranges


CACHES = ["none", "cold", "warm", "growing", "left behind", "full"]


@contextmanager
def compressor_in_state(state: str, source: Memory) -> Iterator[Compressor]:
    """Return a compressor whose cache has the source in this state."""
    data = reference(source)
    half = len(data) // 2
    with (
        tempfile.TemporaryDirectory() as directory,
        at(directory) as cache,
        compressing(None if state == "none" else cache) as compressor,
    ):
        key = key_of(source, compressor)
        if state in {"growing", "warm"}:
            file, filler = filling(cache, key)
            file.close()
            filler.append(data[:half])

            def finish() -> None:
                filler.append(data[half:])
                filler.commit()

            rest = threading.Timer(0.01, finish)
            rest.start()
            if state == "warm":
                rest.join()
            yield compressor
            rest.join()
        elif state == "left behind":
            Path(f"{cache.path(key)}.growing").write_bytes(data[:half])
            yield compressor
            CompressedNar(compressor, source).close()  # fills the cache, although nothing was read
        elif state == "full":
            with patch.object(Filler, "append", full_after(half)):
                yield compressor
        else:
            yield compressor


def key_of(source: Memory, compressor: Compressor) -> str:
    assert source.sha256
    return f"{base32.encode(source.sha256)}.{compressor.encoder.encoding.name}"


def full_after(size: int) -> Callable[[Filler, bytes], None]:
    append = Filler.append
    left = size

    def append_or_fail(filler: Filler, data: bytes) -> None:
        nonlocal left
        left -= len(data)
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(filler, data)

    return append_or_fail


@pytest.mark.parametrize("state", CACHES)
@settings(max_examples=15)
@given(data=st.data())
def test_every_range_is_a_slice_of_the_whole(state: str, data: st.DataObject) -> None:
    source = nar(5 * FRAME + 7)
    whole = reference(source)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.none() | st.integers(start, len(whole)))
    with compressor_in_state(state, source) as compressor:
        assert read(compressor, source, start, stop) == whole[start:stop]


@pytest.mark.parametrize("state", CACHES)
def test_size_is_known_once_compressed(state: str) -> None:
    source = nar()
    with compressor_in_state(state, source) as compressor:
        body = CompressedNar(compressor, source)
        assert body.size in ([len(reference(source))] if state == "warm" else [None, len(reference(source))])
        assert everything(plain(body.read(END, None))) == b""
        assert body.size == len(reference(source))
        assert everything(reading(body, 0, body.size)) == reference(source)


def test_download_continues_when_the_filling_process_dies(tmp_path: Path) -> None:
    source = nar(100 * FRAME)
    whole = reference(source)
    with at(tmp_path) as cache, compressing(cache) as compressor:
        path = cache.path(key_of(source, compressor))
        filler = os.open(f"{path}.growing", os.O_WRONLY | os.O_CREAT)
        fcntl.flock(filler, fcntl.LOCK_EX)
        os.write(filler, whole[:30_000])
        with closing(reading(CompressedNar(compressor, source))) as chunks:
            beginning = next(chunks) or b""
            assert len(beginning) > 29_000
            assert next(chunks) is None
            assert not source.reads
            os.close(filler)  # as the kernel does when a process dies
            assert beginning + everything(chunks) == whole
        wait_until(lambda: os.path.exists(path))


def test_download_continues_when_the_disk_is_full(tmp_path: Path) -> None:
    source = nar(100 * FRAME)
    with at(tmp_path) as cache, compressing(cache) as compressor, patch.object(Filler, "append", full_after(30_000)):
        assert read(compressor, source) == reference(source)
    assert not os.listdir(tmp_path)


@pytest.mark.root
def test_full_disk_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sources = [nar(8 * MIB, seed) for seed in range(3)]
    with mounted(tmp_path / "disk") as disk, at(disk) as cache, compressing(cache, frame_size=MIB // 4) as compressor:
        bodies = [CompressedNar(compressor, source) for source in sources]
        for body, source in zip(bodies, sources, strict=True):
            assert everything(reading(body)) == reference(source, MIB // 4)
        assert not os.listdir(disk)
        assert messages(caplog) == [without(disk, errno.ENOSPC)]


def test_evicted_file_is_read_to_its_end(tmp_path: Path) -> None:
    source = nar(2 * MIB)
    with at(tmp_path) as cache, compressing(cache, frame_size=MIB) as compressor:
        whole = read(compressor, source)
        wait_until(lambda: cache.counters.fills)
        with closing(reading(CompressedNar(compressor, source))) as chunks:
            beginning = next(chunks) or b""
            cache.limit = 0
            cache.evict()
            assert not os.listdir(tmp_path)
            assert beginning + everything(chunks) == whole
        assert len(source.reads) == 3
        cache.limit = MIB * 10
        assert read(compressor, source, 100) == whole[100:]  # compressed again


def test_file_truncated_while_it_is_read_breaks_off(tmp_path: Path) -> None:
    source = nar()
    with at(tmp_path) as cache, compressing(cache) as compressor:
        read(compressor, source)
        wait_until(lambda: cache.counters.fills)
        body = CompressedNar(compressor, source)
        os.truncate(cache.path(key_of(source, compressor)), 100)
        with pytest.raises(CacheFileError):
            everything(reading(body))
        assert read(compressor, source) == reference(source)


# Wrong sources


def with_wrong_hash(source: Memory) -> Memory:
    return Memory(source.content, bytes(32))


def changed(part: Callable[[Memory, int, int], bytes], source: Memory) -> Memory:
    def read(start: int, stop: int) -> Generator[bytes]:
        yield part(source, start, stop)

    source.read = read  # type: ignore[method-assign]
    return source


def cut_short(source: Memory, start: int, stop: int) -> bytes:
    return source.content[start : min(stop, source.size - 1)]


def too_long(source: Memory, start: int, stop: int) -> bytes:
    return source.content[start:stop] + (b"more" if stop == source.size else b"")


def broken(error: Exception) -> Callable[[Memory, int, int], bytes]:
    def part(source: Memory, start: int, stop: int) -> bytes:
        if start == 4 * FRAME:
            raise error
        return source.content[start:stop]

    return part


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("size", [10, 10 * FRAME, 10 * FRAME + 1])
@pytest.mark.parametrize(
    "falsify",
    [with_wrong_hash, lambda source: changed(cut_short, source), lambda source: changed(too_long, source)],
    ids=["another hash", "cut short", "too long"],
)
def test_wrong_nar_never_completes_and_is_not_kept(
    tmp_path: Path, falsify: Callable[[Memory], Memory], size: int, *, cached: bool
) -> None:
    source = falsify(nar(size))
    parts: list[bytes] = []
    with at(tmp_path) as cache, compressing(cache if cached else None) as compressor:
        with pytest.raises(StoreObjectError):  # noqa: PT012 (what came before counts)
            for part in reading(CompressedNar(compressor, source)):
                parts.append(part or b"")
                time.sleep(0.001)
        assert len(b"".join(parts)) < len(reference(source))
        assert len(decompress(b"".join(parts))) <= (size - 1) // FRAME * FRAME
        assert compressor.files.known_file_info(source.sha256 or b"") is None
        assert cache.counters.fills == 0
    assert not os.listdir(tmp_path)


def test_damaged_nar_is_logged_once_until_it_is_repaired(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, damaged = nar(), changed(cut_short, nar())
    with at(tmp_path) as cache, compressing(cache) as compressor:
        for times in (1, 2):
            for _ in range(3):
                with pytest.raises(StoreObjectError):
                    read(compressor, damaged)
            assert cache.counters.misses == 2 * times - 1  # a damaged NAR is tried once for the cache
            assert compressor.damaged_nars == 4 * times
            assert len(caplog.records) == times
            assert read(compressor, source) == reference(source)
            assert cache.counters.fills == times - 1
            assert read(compressor, source) == reference(source)
            wait_until(lambda: cache.counters.fills == times)  # noqa: B023 (called in the same iteration)
            for name in os.listdir(tmp_path):
                os.unlink(tmp_path / name)


@pytest.mark.parametrize("falsify", [cut_short, too_long])
def test_log_message_for_a_damaged_nar_names_its_path(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, falsify: Callable[[Memory, int, int], bytes]
) -> None:
    source = changed(falsify, nar())
    with at(tmp_path) as cache, compressing(cache) as compressor, pytest.raises(StoreObjectError):
        read(compressor, source)
    [record] = caplog.records
    assert record.getMessage().startswith(f"{source}: it does not have its registered {source.size} bytes")


def test_repaired_nar_of_known_size_is_kept_again(tmp_path: Path) -> None:
    source, damaged = nar(), changed(cut_short, nar())
    with at(tmp_path) as cache, compressing(cache) as compressor:
        assert read(compressor, source) == reference(source)
        wait_until(lambda: cache.counters.fills == 1)
        assert read(compressor, source) == reference(source)
        os.unlink(cache.path(key_of(source, compressor)))
        with pytest.raises(StoreObjectError):
            read(compressor, damaged, 0, len(reference(source)))
        for _ in range(2):
            body = CompressedNar(compressor, source)
            assert body.size == len(reference(source))
            assert everything(reading(body, 0, body.size)) == reference(source)
        wait_until(lambda: cache.counters.fills == 2)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "it is broken"), StoreObjectError("it is broken")])
def test_error_of_the_source_is_raised_once(tmp_path: Path, error: Exception, *, cached: bool) -> None:
    source = changed(broken(error), nar())
    with at(tmp_path) as cache, compressing(cache if cached else None) as compressor:
        with pytest.raises(type(error), match="it is broken"):
            read(compressor, source)
        assert read(compressor, source, 0, 1000) == reference(nar())[:1000]
        fill(cache, "another")  # it was not an error of the cache
        source.__dict__.pop("read")
        assert read(compressor, source) == reference(source)
    assert set(os.listdir(tmp_path)) <= {key_of(source, compressor), "another"}


def test_thread_that_cannot_start_blocks_no_reader(tmp_path: Path) -> None:
    source = nar()
    refusal = RuntimeError("can't start new thread")
    with at(tmp_path) as cache, compressing(cache) as compressor:
        with patch("threading.Thread.start", side_effect=refusal):
            for _ in range(3):
                with pytest.raises(RuntimeError, match="can't start new thread"):
                    read(compressor, source)
        assert compressor.encoder.waiting == 0
        assert not os.listdir(tmp_path)
        assert read(compressor, source) == reference(source)
        wait_until(lambda: cache.counters.fills == 1)


# Concurrency


def test_concurrent_readers_share_one_compression(tmp_path: Path) -> None:
    source = nar()
    ready = threading.Barrier(50)

    def ask() -> bytes:
        ready.wait()
        return read(compressor, source)

    with at(tmp_path) as cache, compressing(cache) as compressor, ThreadPoolExecutor(50) as clients:
        answers = [clients.submit(ask) for _ in range(50)]
        assert {answer.result() for answer in answers} == {reference(source)}
        assert sorted(source.reads) == list(range(0, source.size, FRAME))
    assert cache.counters.fills == 1


def test_threads_that_finish_frames_at_the_same_time_share_the_next_frames(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = nar(50 * FRAME)
    offsets = Encoding.offsets

    def slow_offsets(encoding: Encoding, size: int) -> Iterator[int]:
        for offset in offsets(encoding, size):
            time.sleep(0.001)  # lets another thread run
            yield offset

    with at(tmp_path) as cache, compressing(cache) as compressor:
        with patch.object(Encoding, "offsets", slow_offsets):
            CompressedNar(compressor, source).close()
            wait_until(lambda: cache.counters.fills == 1)
        assert sorted(source.reads) == list(range(0, source.size, FRAME))
        assert read(compressor, source) == reference(source)
    assert not messages(caplog)  # no error ended the work of a thread


def test_small_nar_does_not_wait_for_a_huge_one(tmp_path: Path) -> None:
    order: list[str] = []
    begin = threading.Event()

    def huge_read(_: int) -> None:
        begin.wait(PATIENCE_S)
        order.append("huge")

    huge = nar(100 * FRAME, before=huge_read)
    small = nar(seed=1, size=FRAME, before=lambda _: order.append("small"))
    with at(tmp_path) as cache, compressing(cache, threads=2) as compressor:
        huge_body = CompressedNar(compressor, huge)
        small_body = CompressedNar(compressor, small)
        begin.set()
        assert everything(reading(small_body)) == reference(small)
        assert order.index("small") <= 2 + 2  # after the frames in progress, and at most one more for each thread
        assert everything(reading(huge_body)) == reference(huge)


def test_encoder_is_saturated_while_many_frames_wait(tmp_path: Path) -> None:
    begin = threading.Event()
    sources = [nar(seed=seed, before=lambda _: begin.wait(PATIENCE_S) and None) for seed in range(20)]
    with at(tmp_path) as cache, compressing(cache, threads=1) as compressor:
        saturated = []
        for source in sources:
            CompressedNar(compressor, source).close()
            saturated.append(compressor.encoder.saturated)
        assert saturated == [False] * 8 + [True] * 12  # each NAR has a frame in progress, and the next one
        begin.set()
        wait_until(lambda: cache.counters.fills == len(sources))
        assert not compressor.encoder.saturated


@pytest.mark.parametrize("cached", [True, False])
def test_few_frames_wait_for_a_slow_frame(tmp_path: Path, *, cached: bool) -> None:
    begin = threading.Event()
    source = nar(before=lambda start: begin.wait(PATIENCE_S) and None if start == 0 else None)
    with at(tmp_path) as cache, compressing(cache if cached else None, threads=4) as compressor:
        chunks = reading(CompressedNar(compressor, source))
        assert next(chunks) is None
        wait_until(lambda: 0 in source.reads and compressor.encoder.waiting == 1)  # only the slow frame
        assert next(chunks) is None
        assert len(source.reads) == (5 if cached else 1)
        begin.set()
        assert everything(chunks) == reference(source)


def test_few_frames_wait_for_a_slow_client_without_a_cache() -> None:
    source = nar()
    with compressing(threads=4) as compressor, closing(reading(CompressedNar(compressor, source))) as chunks:
        beginning = everything(up_to_first_data(chunks))
        wait_until(lambda: compressor.encoder.waiting == 0)
        assert len(source.reads) == 1
        assert beginning + everything(chunks) == reference(source)


def up_to_first_data(chunks: Iterator[bytes | None]) -> Iterator[bytes | None]:
    """Yield up to the first chunk with data."""
    for chunk in chunks:
        yield chunk
        if chunk:
            break


def test_compression_completes_when_the_client_leaves(tmp_path: Path) -> None:
    source = nar()
    with at(tmp_path) as cache, compressing(cache) as compressor:
        with closing(reading(CompressedNar(compressor, source))) as chunks:
            next(chunks)
        wait_until(lambda: cache.counters.fills)
        assert read(compressor, source) == reference(source)
        assert len(source.reads) == 11


def test_number_of_fills_without_clients_is_bounded(tmp_path: Path) -> None:
    begin = threading.Event()
    slow = [nar(100, seed, before=lambda _: begin.wait(PATIENCE_S) and None) for seed in (1, 2)]
    another = nar(seed=3)
    with (
        patch("harmonia.cache.nar_compressor._MAX_FILLS", 2),
        at(tmp_path) as cache,
        compressing(cache, threads=3) as compressor,
    ):
        for source in slow:
            CompressedNar(compressor, source).close()
        assert read(compressor, another) == reference(another)
        assert len(os.listdir(tmp_path)) == 2
        begin.set()
        # A fill counts as one in progress for a moment longer than until its file is complete.
        wait_until(lambda: not compressor._fills.total())  # noqa: SLF001 (a private part is tested)
        assert cache.counters.fills == 2
        with ThreadPoolExecutor(4) as clients:
            assert set(clients.map(lambda _: read(compressor, another), range(4))) == {reference(another)}
        wait_until(lambda: cache.counters.fills == 3)
        full = changed(cut_short, nar(seed=4))
        for _ in range(3):
            with pytest.raises(StoreObjectError):
                read(compressor, full)
        read(compressor, nar(seed=6))
        wait_until(lambda: cache.counters.fills == 4)


def test_other_encodings_use_one_thread_and_few_fills(tmp_path: Path) -> None:
    """Requests in the encoding of another server do not delay those in our own."""
    cache = DiskCache(str(tmp_path), 1 << 30)
    gate = threading.Event()
    other = Encoding.of(Zstd(level=9))

    def wait(_: int) -> None:
        gate.wait()

    with compressing(cache) as compressor:
        sources = [nar(seed=number, before=wait) for number in range(20)]
        bodies = [CompressedNar(compressor, source, other) for source in sources]
        assert len(os.listdir(tmp_path)) == 16
        wait_until(lambda: any(source.reads for source in sources))
        ours = nar(seed=100)
        assert read(compressor, ours) == reference(ours)
        assert sum(len(source.reads) for source in sources) == 1
        gate.set()
        for source, body in zip(sources, bodies, strict=True):
            assert decompress(everything(reading(body))) == source.content


def test_abandoned_body_without_a_cache_is_not_compressed() -> None:
    begin = threading.Event()
    first, second = nar(before=lambda _: begin.wait(PATIENCE_S) and None), nar()
    with compressing(threads=1) as compressor:
        chunks = reading(CompressedNar(compressor, first))
        assert next(chunks) is None  # the only thread is busy with this source
        with closing(reading(CompressedNar(compressor, second))) as left:
            assert next(left) is None
        begin.set()
        assert everything(chunks) == reference(first)
    assert not second.reads


# File info for narinfos, and counters


def test_file_info_is_known_once_compressed(tmp_path: Path) -> None:
    source = nar()
    sha256 = source.sha256 or b""
    data = reference(source)
    with at(tmp_path) as cache, compressing(cache) as compressor:
        assert compressor.files.find_file_info(sha256) is None
        read(compressor, source)
        known = CompressedFile(hashlib.sha256(data).digest(), len(data))
        assert compressor.files.known_file_info(sha256) == known
        wait_until(lambda: cache.counters.fills)
        another = Compressor(Zstd(), cache)
        assert another.files.known_file_info(sha256) is None
        assert another.files.find_file_info(sha256) == another.files.known_file_info(sha256) == known
        cache.limit = 0
        cache.evict()
        assert compressor.files.find_file_info(sha256) == known
        assert Compressor(Zstd(), cache).files.find_file_info(sha256) is None


def test_number_of_remembered_file_infos_is_bounded(tmp_path: Path) -> None:
    with (
        patch("harmonia.cache.compressed_files._MAX_KNOWN_FILES", 2),
        at(tmp_path) as cache,
        compressing(cache) as compressor,
    ):
        sources = [nar(seed=seed) for seed in range(3)]
        for source in sources:
            read(compressor, source)
        assert [compressor.files.known_file_info(source.sha256 or b"") is not None for source in sources] == [
            False,
            True,
            True,
        ]


def test_time_and_bytes_are_counted(tmp_path: Path) -> None:
    source = nar(200 * FRAME)
    with at(tmp_path) as cache, compressing(cache) as compressor:
        assert compressor.encoder.seconds == 0
        read(compressor, source)
        wait_until(lambda: cache.counters.fills)
        seconds = compressor.encoder.seconds
        assert seconds > 0
        read(compressor, source)
        assert compressor.encoder.seconds == seconds
        counters = cache.counters
        assert (counters.hits, counters.misses, counters.fills) == (1, 1, 1)
        assert counters.filled_bytes == len(reference(source))


# Threads


@pytest.mark.parametrize(
    ("cpus", "options", "threads"),
    [
        (2, Zstd(), 2),
        (64, Zstd(), 8),
        (64, Zstd(max_ldm_encoders_per_worker=1), 8),
        (64, Zstd(long_distance_matching=True, max_ldm_encoders_per_worker=1), 1),
        (4, Zstd(long_distance_matching=True, max_ldm_encoders_per_worker=0), 4),
    ],
)
def test_number_of_threads(cpus: int, options: Zstd, threads: int) -> None:
    with patch.object(os, "sched_getaffinity", lambda _: set(range(cpus))):
        number, pool = zstd.encoders(options)
    pool.shutdown()
    assert number == threads


@pytest.mark.parametrize("niceness", [0, 5, 15])
def test_encoder_threads_are_nicer_than_their_process(niceness: int) -> None:
    """A process of its own checks it, because lowering the niceness needs privileges."""
    program = (
        "import os; from harmonia.cache import zstd; from harmonia.config.tables.zstd import Zstd\n"
        f"ours = os.nice({niceness})\n"
        "_, pool = zstd.encoders(Zstd())\n"
        "print(ours, pool.submit(os.getpriority, os.PRIO_PROCESS, 0).result())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    ours, theirs = map(int, done.stdout.split())
    assert theirs == min(ours + 10, 19)


def test_threads_that_cannot_change_their_niceness_compress() -> None:
    with patch.object(os, "setpriority", side_effect=PermissionError):
        _, pool = zstd.encoders(Zstd())
        assert pool.submit(int).result() == 0
        pool.shutdown()

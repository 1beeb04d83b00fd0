"""Ranges of an evicted compressed NAR: compressed again from the right frame on, found by the index of frames."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from harmonia.cache.disk_cache import DiskCache
from harmonia.cache.frame_index import FrameIndex
from harmonia.cache.nar_compressor import CompressedNar
from harmonia.errors import StoreObjectError
from support.compression import FRAME, Memory, compressing, everything, nar, read, reading
from support.disk_cache import at, no_leak
from support.running import PATIENCE_S, wait_until


@pytest.fixture(autouse=True)
def _no_leak() -> Iterator[None]:
    with no_leak():
        yield


@pytest.fixture
def indexes(tmp_path: Path) -> Iterator[DiskCache]:
    with at(tmp_path / "frames") as cache:
        yield cache


def compressed_once(tmp_path: Path, indexes: DiskCache, source: Memory) -> bytes:
    """Compress a NAR into a cache, and evict it, but keep its index."""
    with at(tmp_path / "nar") as cache, compressing(cache, indexes=indexes) as compressor:
        whole = read(compressor, source)
        wait_until(lambda: indexes.counters.fills)
        cache.limit = 0
        cache.evict()
    source.reads.clear()
    return whole


def test_range_reads_nothing_before_its_frame(tmp_path: Path, indexes: DiskCache) -> None:
    source = nar(10 * FRAME + 1)
    whole = compressed_once(tmp_path, indexes, source)
    with compressing(indexes=indexes) as compressor:
        for start in (0, 1, len(whole) // 2, len(whole) - 1):
            source.reads.clear()
            body = CompressedNar(compressor, source)
            assert body.size == len(whole)
            assert everything(reading(body, start, body.size)) == whole[start:]
            if start == len(whole) - 1:
                assert source.reads == [10 * FRAME]


def test_range_does_not_wait_for_the_fill(tmp_path: Path, indexes: DiskCache) -> None:
    """The fill is blocked until the range has arrived."""
    released = threading.Event()
    timed_out = threading.Event()
    source = nar(10 * FRAME + 1)
    whole = compressed_once(tmp_path, indexes, source)

    def before(start: int) -> None:
        if start == 0 and not released.wait(PATIENCE_S):
            timed_out.set()

    source.before = before
    with at(tmp_path / "nar") as cache, compressing(cache, indexes=indexes) as compressor:
        try:
            for start, stop in ((len(whole) // 2, len(whole)), (len(whole) - 900, len(whole) - 5)):
                assert everything(reading(CompressedNar(compressor, source), start, stop)) == whole[start:stop]
                assert not timed_out.is_set()
        finally:
            released.set()
        assert read(compressor, source) == whole


def test_size_and_hash_survive_eviction_and_restart(tmp_path: Path, indexes: DiskCache) -> None:
    source = nar(10 * FRAME + 1)
    whole = compressed_once(tmp_path, indexes, source)
    with at(tmp_path / "nar") as cache, compressing(cache, indexes=indexes) as compressor:
        found = compressor.files.find_file_info(source.sha256 or b"")
        assert found is not None
        assert found.size == len(whole) == compressor.files.file_size(source.sha256 or b"", compressor.encoder.encoding)
        assert not compressor.files.has_file(source.sha256 or b"")


def test_damaged_index_is_ignored(tmp_path: Path, indexes: DiskCache) -> None:
    source = nar(10 * FRAME + 1)
    whole = compressed_once(tmp_path, indexes, source)
    [file] = (tmp_path / "frames").iterdir()
    content = bytearray(file.read_bytes())
    content[40] ^= 1
    file.write_bytes(content)
    with compressing(indexes=indexes) as compressor:
        body = CompressedNar(compressor, source)
        assert body.size is None
        assert everything(reading(body, 100)) == whole[100:]
    assert indexes.counters.corrupt == 1


def test_range_of_a_changed_nar_breaks_off(tmp_path: Path, indexes: DiskCache) -> None:
    source = nar(10 * FRAME + 1)
    whole = compressed_once(tmp_path, indexes, source)
    source.content = source.content[:-1] + b"x"
    with compressing(indexes=indexes) as compressor:
        chunks = reading(CompressedNar(compressor, source), len(whole) // 2, len(whole))
        with pytest.raises(StoreObjectError, match="differs"):
            everything(chunks)


def test_file_of_one_frame_has_no_index(tmp_path: Path, indexes: DiskCache) -> None:
    with at(tmp_path / "nar") as cache, compressing(cache, indexes=indexes) as compressor:
        read(compressor, nar(FRAME))
        wait_until(lambda: cache.counters.fills)
    assert not list((tmp_path / "frames").iterdir())


def test_dumped_index_is_loaded_unchanged() -> None:
    index = FrameIndex(bytes(range(32)), ((1 << 40, b"12345678"), (7, b"87654321")))
    assert FrameIndex.load(index.dump()) == index
    assert [index.frame_end(position) for position in (0, (1 << 40) - 1, 1 << 40)] == [1 << 40, 1 << 40, (1 << 40) + 7]

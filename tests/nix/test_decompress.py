"""Every valid file of every compression is decompressed, in pieces of any size; all others are rejected."""

import bz2
import gzip
import io
import lzma
import subprocess
import time
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import brotli
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from harmonia.errors import FormatError
from harmonia.nix.decompress import (
    COMPRESSIONS,
    LARGE_MEMORY_BYTES,
    WindowError,
    decompressor,
    unpack_file,
)
from support.packing import PACK, deflate, lzip, unpacked


def tool(*command: str) -> Callable[[bytes], bytes]:
    return lambda content: subprocess.run(command, input=content, capture_output=True, check=True).stdout


def skippable(content: bytes) -> bytes:
    return b"\x5a\x2a\x4d\x18" + len(content).to_bytes(4, "little") + content


def xz(check: int) -> Callable[[bytes], bytes]:
    return lambda content: lzma.compress(content, check=check)


SINGLE = {"br", "lzma"}
"""Formats that do not allow concatenated streams."""

contents = st.binary(max_size=300) | st.binary(min_size=1, max_size=9).map(lambda data: data * 50_000)


def test_every_compression_of_nix_is_tested() -> None:
    assert PACK.keys() == COMPRESSIONS


@given(
    st.sampled_from(sorted(PACK)),
    st.lists(contents, min_size=1, max_size=3),
    st.lists(st.integers(0, 2000), max_size=9),
)
def test_concatenated_streams_are_one_file(compression: str, parts: list[bytes], cuts: list[int]) -> None:
    parts = parts[:1] if compression in SINGLE else parts
    data = b"".join(map(PACK[compression], parts))
    assert unpacked(decompressor(compression), data, cuts) == b"".join(parts)


VARIANTS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "xz without a check": ("xz", xz(lzma.CHECK_NONE)),
    "xz with CRC32": ("xz", xz(lzma.CHECK_CRC32)),
    "xz with SHA-256": ("xz", xz(lzma.CHECK_SHA256)),
    "xz padded": ("xz", lambda data: lzma.compress(data) + bytes(8)),
    "xz padded between streams": ("xz", lambda data: lzma.compress(data) + bytes(4) + lzma.compress(b"")),
    "xz in blocks": ("xz", tool("xz", "--block-size=1000", "-T2", "-c")),
    "xz with a filter": ("xz", tool("xz", "--x86", "--lzma2", "-c")),
    "xz with delta": ("xz", tool("xz", "--delta=dist=4", "--lzma2=preset=1", "-c")),
    "xz -9e": ("xz", tool("xz", "-9e", "-c")),
    "lzma by xz": ("lzma", tool("xz", "--format=lzma", "-c")),
    "lzma followed by garbage": ("lzma", lambda data: PACK["lzma"](data) + b"garbage"),
    "gzip padded with zeros": ("gzip", lambda data: gzip.compress(data) + bytes(513)),
    "gzip followed by garbage": ("gzip", lambda data: gzip.compress(data) + b"\x1f\x8bgarbage"),
    "gzip with an empty member": ("gzip", lambda data: gzip.compress(b"") + gzip.compress(data) + gzip.compress(b"")),
    "gzip by gzip": ("gzip", tool("gzip", "-9", "-n")),
    "gzip stored": ("gzip", lambda data: gzip.compress(data, 0)),
    "gzip with all of the head": (
        "gzip",
        lambda data: (
            b"\x1f\x8b\x08\x1e\0\0\0\0\0\x03\x02\0exname\0comment\0"
            + zlib.crc32(b"\x1f\x8b\x08\x1e\0\0\0\0\0\x03\x02\0exname\0comment\0").to_bytes(4, "little")[:2]
            + deflate(data)
            + zlib.crc32(data).to_bytes(4, "little")
            + len(data).to_bytes(4, "little")
        ),
    ),
    "bzip2 by bzip2": ("bzip2", tool("bzip2", "-1", "-c")),
    "bzip2 padded with zeros": ("bzip2", lambda data: bz2.compress(data) + bytes(100)),
    "bzip2 followed by garbage": ("bzip2", lambda data: bz2.compress(data) + b"BZgarbage"),
    "zstd with skippable frames": (
        "zstd",
        lambda data: skippable(b"head") + PACK["zstd"](data) + skippable(b"") + skippable(b"x" * 5000),
    ),
    "zstd without content size": ("zstd", zstandard.ZstdCompressor(write_content_size=False).compress),
    "zstd with a checksum": ("zstd", zstandard.ZstdCompressor(write_checksum=True).compress),
    "zstd by zstd": ("zstd", tool("zstd", "-19", "-c")),
    "zstd --long=27": ("zstd", tool("zstd", "--long=27", "-c")),
    "zstd stored": ("zstd", tool("zstd", "--no-compress-literals", "-1", "-c")),
    "zstd with an empty frame": ("zstd", lambda data: PACK["zstd"](b"") + PACK["zstd"](data)),
    "br with a large window": ("br", lambda data: brotli.compress(data, lgwin=24)),
    "br at level 0": ("br", lambda data: brotli.compress(data, quality=0)),
    "lzip version 0": ("lzip", lambda data: lzip(data, 0)),
    "lzip followed by garbage": ("lzip", lambda data: lzip(data) + b"LZgarbage"),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("content", [b"", b"nix" * 30_000 + bytes(range(256)) * 16], ids=["empty", "content"])
def test_valid_file_is_decompressed(variant: str, content: bytes) -> None:
    compression, pack = VARIANTS[variant]
    data = pack(content)
    for cuts in ((), range(1, min(len(data), 3000)), (len(data) - 1,)):
        assert unpacked(decompressor(compression), data, cuts) == content


@given(st.sampled_from(sorted(PACK.keys() - {"none"})), contents, st.data())
def test_truncated_file_is_not_whole(compression: str, content: bytes, data: st.DataObject) -> None:
    file = PACK[compression](content)
    assert unpacked(decompressor(compression), file[: data.draw(st.integers(0, len(file) - 1))]) is None


@given(st.sampled_from(sorted(PACK)), contents)
def test_file_is_unpacked(compression: str, content: bytes) -> None:
    assert b"".join(unpack_file(io.BytesIO(PACK[compression](content)), compression)) == content


@given(st.lists(contents.map(PACK["zstd"]) | st.just(skippable(b"x")), min_size=1))
def test_all_frames_of_a_zstd_file_are_unpacked(frames: list[bytes]) -> None:
    data = b"".join(frames)
    assert b"".join(unpack_file(io.BytesIO(data), "zstd")) == unpacked(decompressor("zstd"), data)


@given(st.sampled_from(sorted(PACK.keys() - {"none"})), contents, st.data())
def test_truncated_file_is_rejected_or_unpacks_to_the_beginning(
    compression: str, content: bytes, data: st.DataObject
) -> None:
    packed = PACK[compression](content)
    file = io.BytesIO(packed[: data.draw(st.integers(0, len(packed) - 1))])
    pieces = b""
    with suppress(FormatError):
        for piece in unpack_file(file, compression):
            pieces += piece
        assert compression == "zstd"
    assert content.startswith(pieces)


@pytest.mark.parametrize("compression", sorted(PACK.keys() - {"none"}))
def test_pieces_of_a_file_of_zeros_are_small(compression: str) -> None:
    packed = PACK[compression](bytes(20 << 20))
    sizes = list(map(len, unpack_file(io.BytesIO(packed), compression)))
    assert (sum(sizes), max(sizes) <= 2 << 20) == (20 << 20, True)


@pytest.mark.parametrize("zeros", [1, 2, 3, 5])
def test_xz_padding_must_be_a_multiple_of_four_bytes(zeros: int) -> None:
    assert unpacked(decompressor("xz"), lzma.compress(b"x") + bytes(zeros)) is None
    with pytest.raises(FormatError):
        unpacked(decompressor("xz"), lzma.compress(b"x") + bytes(zeros) + lzma.compress(b"y"))


@pytest.mark.parametrize("compression", ["xz", "zstd"])
def test_garbage_after_xz_and_zstd_is_rejected_as_by_libarchive(compression: str) -> None:
    with pytest.raises(FormatError):
        unpacked(decompressor(compression), PACK[compression](b"x") + b"garbage, and more")


@pytest.mark.parametrize("compression", sorted(PACK.keys() - {"none"}))
def test_garbage_is_rejected(compression: str) -> None:
    with pytest.raises(FormatError):
        unpacked(decompressor(compression), b"neither this nor that, but garbage" * 10)


@pytest.mark.parametrize("compression", sorted(PACK.keys() - {"none"}))
def test_bomb_is_decompressed_in_little_memory(compression: str) -> None:
    size = {"zstd": 256 << 20, "br": 64 << 20}.get(compression, 16 << 20)  # much more than the windows of each
    pack = partial(brotli.compress, quality=5) if compression == "br" else PACK[compression]
    bomb = pack(bytes(size))
    tracemalloc.start()
    assert sum(map(len, decompressor(compression).feed(bomb))) == size
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < min(size * 3 // 4, 48 << 20)


def test_huge_window_raises_window_error_instead_of_format_error() -> None:
    file = lzma.compress(b"x" * 1000, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 512 << 20}])
    with pytest.raises(WindowError):
        unpacked(decompressor("xz"), file)
    assert unpacked(decompressor("xz", LARGE_MEMORY_BYTES), file) == b"x" * 1000


@pytest.mark.parametrize("compression", sorted(PACK.keys() - SINGLE - {"none"}))
def test_many_empty_streams_take_linear_time(compression: str) -> None:
    """Each stream copies the rest of its piece of input: without a bound on the piece, this takes a minute."""
    inner = decompressor(compression)
    file = PACK[compression](b"") * 50_000
    began = time.process_time()
    assert b"".join(inner.feed(file)) == b""
    assert time.process_time() - began < 20
    assert inner.whole

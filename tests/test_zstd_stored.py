"""zstd files of raw blocks, checked with libzstd and the zstd command."""

import random
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future
from itertools import pairwise

import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from harmonia.cache.zstd_stored import BLOCK_BYTES, store, stored_size
from harmonia.errors import StoreObjectError
from support.programs import needs

NOISE = random.Random(1).randbytes(3 * BLOCK_BYTES + 2)
SIZES = st.builds(lambda blocks, more: max(0, blocks * BLOCK_BYTES + more), st.integers(0, 3), st.integers(-2, 2))


def stored(chunks: list[bytes], size: int) -> bytes:
    return b"".join(piece for piece in store(chunks, size) if isinstance(piece, bytes))


@given(SIZES | st.integers(0, len(NOISE)), st.lists(st.integers(0, len(NOISE)), max_size=5))
@example(0, [])
@example(BLOCK_BYTES, [])
@example(BLOCK_BYTES + 1, [BLOCK_BYTES])
def test_decoders_get_the_content_and_the_predicted_length(size: int, cuts: list[int]) -> None:
    content = NOISE[:size]
    ends = sorted({0, size, *(cut for cut in cuts if cut < size)})
    chunks = [content[start:stop] for start, stop in pairwise(ends)]
    file = stored(chunks, size)
    assert len(file) == stored_size(size)
    assert stored([content], size) == file
    decoder = zstandard.ZstdDecompressor().decompressobj()
    assert (decoder.decompress(file), decoder.eof, decoder.unused_data) == (content, True, b"")
    parameters = zstandard.get_frame_parameters(file)
    assert (parameters.content_size, parameters.window_size, parameters.has_checksum) == (size, BLOCK_BYTES, True)


@needs("zstd")
@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 2 * BLOCK_BYTES, len(NOISE)])
def test_zstd_command_accepts_it_and_rejects_a_changed_byte(size: int) -> None:
    file = stored([NOISE[:size]], size)
    assert subprocess.run(["zstd", "-dc"], input=file, capture_output=True, check=True).stdout == NOISE[:size]
    changed = file[:-5] + bytes([file[-5] ^ 1]) + file[-4:]
    assert subprocess.run(["zstd", "-dc"], input=changed, capture_output=True, check=False).returncode != 0


@pytest.mark.parametrize("size", [len(NOISE) - 1, len(NOISE) + 1, 0, 1])
def test_wrong_length_raises_before_the_file_is_complete(size: int) -> None:
    sent: list[bytes | Future[bytes]] = []
    with pytest.raises(StoreObjectError, match=f"instead of {size}"):
        sent.extend(store([NOISE], size))
    assert sum(len(piece) for piece in sent if isinstance(piece, bytes)) < stored_size(size)


def test_error_at_the_end_of_the_content_comes_before_the_last_block() -> None:
    def chunks() -> Iterator[bytes]:
        yield NOISE
        raise StoreObjectError("another hash")

    sent: list[bytes | Future[bytes]] = []
    with pytest.raises(StoreObjectError, match="another hash"):
        sent.extend(store(chunks(), len(NOISE)))
    assert sum(len(piece) for piece in sent if isinstance(piece, bytes)) < stored_size(len(NOISE))


def test_wait_is_passed_through() -> None:
    wait: Future[bytes] = Future()
    assert wait in list(store([b"a", wait, b"b"], 2))

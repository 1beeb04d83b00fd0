"""HTTP bodies are decoded in every content coding that we accept, and in bounded memory."""

import gzip
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmonia.errors import FormatError
from harmonia.nix.content_coding import MAX_CODINGS, SizeError, decoder
from support.packing import PACK, deflate, unpacked

CODE: dict[str, Callable[[bytes], bytes]] = {
    **{name: pack for name, pack in PACK.items() if name != "none"},
    "GZip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "Deflate": deflate,
    "identity": bytes,
    "none": bytes,
    "": bytes,
}


@given(st.lists(st.sampled_from(sorted(CODE)), max_size=MAX_CODINGS), st.binary(max_size=3000), st.data())
def test_content_codings_are_decoded_in_reverse_order(codings: list[str], body: bytes, data: st.DataObject) -> None:
    encoded = body
    for coding in codings:
        encoded = CODE[coding](encoded)
    inner = decoder(codings)
    if inner is None:
        assert encoded == body
    else:
        assert unpacked(inner, encoded, data.draw(st.lists(st.integers(0, 3000), max_size=5))) == body


@given(st.binary(max_size=3000), st.integers(0, 9), st.lists(st.integers(0, 200), max_size=5))
def test_deflate_is_accepted_with_and_without_zlib_header(body: bytes, level: int, cuts: list[int]) -> None:
    stream = zlib.compressobj(level, wbits=-zlib.MAX_WBITS)
    raw = stream.compress(body) + stream.flush()
    assert unpacked(decoder(["deflate"]), raw, cuts) == body
    assert unpacked(decoder(["deflate"]), zlib.compress(body, level), cuts) == body


@pytest.mark.parametrize("codings", [["rot13"], ["gzip"] * (MAX_CODINGS + 1), ["br", "\x00" * 10_000]])
def test_unknown_content_codings_raise_a_short_error(codings: list[str]) -> None:
    with pytest.raises(FormatError) as caught:
        decoder(codings)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("coding", ["gzip", "br", "zstd"])
def test_empty_body_is_whole_in_every_coding(coding: str) -> None:
    inner = decoder([coding])
    assert inner is not None
    assert inner.whole


@pytest.mark.parametrize("coding", ["gzip", "zstd", "xz", "bzip2"])
def test_decode_stops_at_its_limit_for_many_empty_streams(coding: str) -> None:
    inner = decoder([coding])
    assert inner
    with pytest.raises(SizeError):
        inner.decode(PACK[coding](b"") * 5_000, 2 << 20)

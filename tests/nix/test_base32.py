import base64
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmonia.errors import FormatError
from harmonia.nix import base32
from support.strategies import NIX32, digests


@given(st.binary(max_size=70))
def test_decode_is_the_inverse_of_encode(digest: bytes) -> None:
    text = base32.encode(digest)
    assert len(text) == base32.encoded_length(len(digest))
    assert base32.decode(text) == digest


@given(st.text(NIX32, max_size=60) | st.text(NIX32 + "eotuA\n é", max_size=60))
def test_decode_accepts_only_the_output_of_encode(text: str) -> None:
    """Each digest has exactly one spelling."""
    try:
        digest = base32.decode(text)
    except FormatError:
        return
    assert base32.encode(digest) == text


@given(digests, st.sampled_from("23456789abcdfghijklmnpqrsvwxyz"))
def test_excess_bits_in_the_first_digit_are_rejected(digest: bytes, first: str) -> None:
    """The 52 digits of a SHA-256 have room for 260 bits, and the first digit holds only the last of 256."""
    with pytest.raises(FormatError, match="whole number of bytes"):
        base32.decode(first + base32.encode(digest)[1:])


@given(st.text(NIX32, max_size=60).filter(lambda text: len(text) % 8 in {1, 3, 6}))
def test_lengths_without_a_whole_number_of_bytes_are_rejected(text: str) -> None:
    with pytest.raises(FormatError, match="whole number of bytes"):
        base32.decode(text)


@given(digests, st.integers(0, 51), st.sampled_from("eotuAZ-=\n é٣"))
def test_error_shows_the_invalid_digit(digest: bytes, position: int, digit: str) -> None:
    text = base32.encode(digest)
    with pytest.raises(FormatError) as caught:
        base32.decode(text[:position] + digit + text[position + 1 :])
    assert repr(digit) in str(caught.value)


def test_known_sha256_digest_is_encoded_as_by_nix() -> None:
    digest = base64.b64decode("V0Uo8IyxcQwjs7PoKJOhELzbeT1E3FrW5EnKlf0S9R0=")
    text = "07gm2byrbjj9wkb5mp247mwxpg0hl69jis5kncihqwdiikq2hiap"
    assert base32.encode(digest) == text
    assert base32.decode(text) == digest
    assert (base32.encoded_length(32), base32.encoded_length(20)) == (52, 32)


@pytest.mark.nix
def test_encoding_equals_that_of_nix_hash() -> None:
    digests = [bytes(32), b"\xff" * 32, *(bytes(range(start, start + 32)) for start in range(0, 225, 7))]
    command = ["nix-hash", "--type", "sha256", "--to-base32", *(digest.hex() for digest in digests)]
    nix = subprocess.run(command, check=True, capture_output=True, text=True)
    assert [base32.encode(digest) for digest in digests] == nix.stdout.split()

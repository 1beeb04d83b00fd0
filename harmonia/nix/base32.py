"""Nix's base-32 encoding of digests, *nix32* (Nix `src/libutil/base-nix-32.cc`).

A digest is encoded as a little-endian number, the most significant digit first.
"""

from functools import lru_cache

from harmonia.errors import FormatError
from harmonia.untrusted import excerpt

ALPHABET = "0123456789abcdfghijklmnpqrsvwxyz"  # without e, o, t and u, to avoid digests that spell words
_PAIRS = [first + second for first in ALPHABET for second in ALPHABET]
_DIGITS = {digit: value for value, digit in enumerate(ALPHABET)}


def encoded_length(size: int) -> int:
    """Return the number of digits for `size` bytes: 52 for SHA-256, 32 for the 20 bytes of a store path's hash."""
    return (size * 8 + 4) // 5


@lru_cache(256)  # a request encodes the same digest several times
def encode(digest: bytes) -> str:
    """Return the digits of a digest."""
    number, length = int.from_bytes(digest, "little"), encoded_length(len(digest))
    pairs = "".join([_PAIRS[number >> shift & 1023] for shift in range((length - 1) // 2 * 10, -10, -10)])
    return pairs[length % 2 :]


def decode(text: str) -> bytes:
    """Return the digest that `encode` encodes as `text`.

    Raises FormatError if there is no such digest.
    """
    number = 0
    for digit in text:
        if digit not in _DIGITS:
            raise FormatError(f"{digit!r} is not a digit of Nix's base-32")
        number = number << 5 | _DIGITS[digit]
    size = len(text) * 5 // 8
    if encoded_length(size) != len(text) or number >> size * 8:
        raise FormatError(f"{excerpt(text)} does not encode a whole number of bytes")
    return number.to_bytes(size, "little")

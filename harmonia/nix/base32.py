"""Nix's base-32, *nix32*: a digest as a little-endian number, most significant digit first.

Nix `src/libutil/base-nix-32.cc`.
"""

from harmonia.errors import FormatError
from harmonia.untrusted import excerpt

ALPHABET = "0123456789abcdfghijklmnpqrsvwxyz"  # without e, o, t, u: so that no digest spells a word
_DIGITS = {digit: value for value, digit in enumerate(ALPHABET)}


def encoded_length(size: int) -> int:
    """How many digits a digest of `size` bytes takes: 52 for SHA-256, 32 for the 20 bytes of a store path."""
    return (size * 8 + 4) // 5


def encode(digest: bytes) -> str:
    number = int.from_bytes(digest, "little")
    return "".join(ALPHABET[number >> shift & 31] for shift in range((encoded_length(len(digest)) - 1) * 5, -5, -5))


def decode(text: str) -> bytes:
    """The inverse of `encode`. FormatError where `text` is not what `encode` gives for any digest."""
    number = 0
    for digit in text:
        if digit not in _DIGITS:
            raise FormatError(f"{digit!r} is not a digit of Nix's base-32")
        number = number << 5 | _DIGITS[digit]
    size = len(text) * 5 // 8
    if encoded_length(size) != len(text) or number >> size * 8:
        raise FormatError(f"{excerpt(text)} encodes no whole number of bytes")
    return number.to_bytes(size, "little")

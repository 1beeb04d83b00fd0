"""Hashes in the notations that Nix reads: base 16, Nix's base 32, base 64 and SRI (Nix `src/libutil/hash.cc`)."""

import binascii
import re

from harmonia.errors import FormatError
from harmonia.nix import base32
from harmonia.untrusted import excerpt

SIZES = {"md5": 16, "sha1": 20, "sha256": 32, "sha512": 64, "blake3": 32}
"""Digest length in bytes of each algorithm that Nix supports."""
_BASE64 = re.compile(r"[0-9A-Za-z+/]*")


def parse(text: str) -> tuple[str, bytes]:
    """Return the algorithm and the digest of `sha256:…` or `sha256-…`.

    Raises FormatError if `text` is malformed.
    """
    algorithm, colon, digest = text.partition(":")
    if colon:
        return algorithm, parse_digest(algorithm, digest)
    algorithm, _, digest = text.partition("-")
    size = _size(algorithm)
    return algorithm, _checked(decode_base64(digest), size, digest)


def parse_digest(algorithm: str, digest: str) -> bytes:
    """Return the bytes of a digest in base 16, 32 or 64, which differ in length.

    Raises FormatError if the digest is malformed.
    """
    size = _size(algorithm)
    try:
        if len(digest) == 2 * size and digest.isalnum():
            return bytes.fromhex(digest)
        if len(digest) == base32.encoded_length(size):
            return base32.decode(digest)
    except ValueError:
        raise FormatError(f"malformed {algorithm} hash {excerpt(digest)}") from None
    padded = len(digest) == (size + 2) // 3 * 4
    return _checked(decode_base64(digest) if padded else b"", size, digest)


def decode_base64(text: str) -> bytes:
    """Decode base 64 as Nix does: up to the first `=`, and without the last bits if they are fewer than eight.

    Returns `b""` if the text is malformed.
    """
    digits = text.partition("=")[0]
    if not _BASE64.fullmatch(digits):
        return b""
    digits = digits[: len(digits) - (len(digits) % 4 == 1)]
    return binascii.a2b_base64(digits + "=" * (-len(digits) % 4))


def _size(algorithm: str) -> int:
    if algorithm not in SIZES:
        raise FormatError(f"unknown hash algorithm {excerpt(algorithm)}")
    return SIZES[algorithm]


def _checked(value: bytes, size: int, digest: str) -> bytes:
    if len(value) != size:
        raise FormatError(f"malformed hash {excerpt(digest)}")
    return value

"""Base names of store paths, compared with `checkName` of Nix (`src/libstore/path.cc`)."""

from harmonia.errors import FormatError
from harmonia.nix import base32
from harmonia.nix.store_path import StorePath, is_hash_part

WORDS = [b"0123456789abcdfghijklmnpqrsvwxyz", b"-.", b"-..", b"..-", b".-", b".drv", b"+_?="]

_LETTERS = set(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-._?=")


def _is_valid(data: bytes) -> bool:
    digest, dash, name = data[:32], data[32:33], data[33:]
    first = name.split(b"-")[0]
    return (
        len(digest) == 32
        and set(digest) <= set(base32.ALPHABET.encode())
        and dash == b"-"
        and 0 < len(name) <= 211
        and set(name) <= _LETTERS
        and first not in {b".", b".."}
    )


def check(data: bytes) -> bool:
    text = data.decode("utf-8", "surrogateescape")
    try:
        path = StorePath(text)
    except FormatError:
        assert not _is_valid(data)
        return False
    assert _is_valid(data)
    assert is_hash_part(path.hash_part)
    assert base32.encode(base32.decode(path.hash_part)) == path.hash_part
    assert StorePath.in_dir("/nix/store", f"/nix/store/{text}") == path == f"{path.hash_part}-{path.name}"
    return True

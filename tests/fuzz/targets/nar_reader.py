"""A NAR, in any chunks, is accepted only if our serialization of its content is identical."""

from harmonia.errors import FormatError
from harmonia.nix import nar
from support.nars import Parts, parsed, written

WORDS = [
    nar.encode(word)
    for word in (
        *(b"nix-archive-1", b"(", b")", b"type", b"regular", b"executable", b"contents", b"symlink", b"target"),
        *(b"directory", b"entry", b"name", b"node", b""),
    )
]
WORDS += [b"\xff" * 8, b"\0" * 7 + b"\x80"]


def parts_of(chunks: list[bytes]) -> Parts | None:
    """Return the entries with their contents, or None if it is not a NAR."""
    try:
        return parsed(chunks)
    except FormatError:
        return None


def check(data: bytes) -> bool:
    """Return True if `data` is a NAR. Check that chunking does not matter, and that our serialization is identical."""
    parts = parts_of([data])
    assert parts_of([data[start : start + 5] for start in range(0, len(data), 5)]) == parts
    if parts is None:
        return False
    assert data == written(parts)
    return True

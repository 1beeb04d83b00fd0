"""An archive is what we would write of it, in whatever chunks it comes."""

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
    """The entries, each with its contents, or None where it is no archive."""
    try:
        return parsed(chunks)
    except FormatError:
        return None


def check(data: bytes) -> bool:
    """Whether `data` is an archive: in any chunks or in none, and then to the letter what we write of it."""
    parts = parts_of([data])
    assert parts_of([data[start : start + 5] for start in range(0, len(data), 5)]) == parts
    if parts is None:
        return False
    assert data == written(parts)
    return True

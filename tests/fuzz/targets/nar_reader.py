"""An archive is what we would write of it, in whatever chunks it comes."""

from harmonia.errors import FormatError
from harmonia.nix import nar
from harmonia.nix.nar import Entry, FileSlice
from harmonia.nix.nar_parser import parse

WORDS = [
    nar.encode(word)
    for word in (
        *(b"nix-archive-1", b"(", b")", b"type", b"regular", b"executable", b"contents", b"symlink", b"target"),
        *(b"directory", b"entry", b"name", b"node", b""),
    )
]
WORDS += [b"\xff" * 8, b"\0" * 7 + b"\x80"]


def parsed(chunks: list[bytes]) -> list[tuple[Entry, bytes]] | None:
    """The entries, each with its contents, or None where it is no archive."""
    found: list[tuple[Entry, bytes]] = []
    try:
        for part in parse(chunks):
            if isinstance(part, Entry):
                found.append((part, b""))
            else:
                entry, contents = found.pop()
                found.append((entry, contents + part))
    except FormatError:
        return None
    return found


def check(data: bytes) -> bool:
    """Whether `data` is an archive: in any chunks or in none, and then to the letter what we write of it."""
    parts = parsed([data])
    assert parsed([data[start : start + 5] for start in range(0, len(data), 5)]) == parts
    if parts is None:
        return False
    contents = {entry.path: text for entry, text in parts}
    archive = nar.segments(nar.serialize(entry for entry, _ in parts))
    assert data == b"".join(contents[part.path] if isinstance(part, FileSlice) else part for part in archive)
    return True

"""Whether a downloaded NAR is the one of its narinfo: unpacked, by NarHash and NarSize, which are all that keys sign.

FileHash and FileSize are hints: caches that name files by NarHash pack the same NAR anew, and leave them as they were.
A FileHash that is right saves time, because it shows before the file is unpacked that it is what the upstream means.
"""

import hashlib
from collections.abc import Iterable

from harmonia.errors import FormatError
from harmonia.nix.decompress import MEMORY_BYTES, decompressor
from harmonia.nix.narinfo import NarFile
from harmonia.nix.path_info import PathInfo


class ContentCheck:
    """Unpacks a file while it comes."""

    def __init__(self, info: PathInfo, nar: NarFile, memory: int = MEMORY_BYTES) -> None:
        self._info = info
        self._decompressor = decompressor(nar.compression, memory)
        self._sha256 = hashlib.sha256()
        self._size = 0

    def update(self, data: bytes) -> None:
        """Raise FormatError if the file is wrong so far, WindowError if it takes more memory than it may."""
        for piece in self._decompressor.feed(data):
            self._sha256.update(piece)
            self._size += len(piece)
            if self._size > self._info.nar_size:
                raise FormatError("it unpacks to more than its NarSize")

    def finish(self) -> None:
        """Raise FormatError if the file is not the NAR."""
        if not self._decompressor.whole:
            raise FormatError("it is cut short")
        if (self._sha256.digest(), self._size) != (self._info.nar_hash, self._info.nar_size):
            raise FormatError("it has another NarHash")


def has_file_hash(info: PathInfo, nar: NarFile, sha256: bytes) -> bool:
    """Return whether the file's own hash shows that it is what the upstream means."""
    return sha256 == (info.nar_hash if nar.compression == "none" else nar.file_hash)


def check_content(info: PathInfo, nar: NarFile, file: Iterable[bytes], memory: int = MEMORY_BYTES) -> None:
    """Raise FormatError if the file is not the NAR, WindowError if it takes more memory than it may."""
    check = ContentCheck(info, nar, memory)
    for data in file:
        check.update(data)
    check.finish()

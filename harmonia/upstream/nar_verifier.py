"""Verification of downloaded NARs: the unpacked NAR must have the NarHash and NarSize that the signature covers.

FileHash and FileSize are only hints. Caches that name files by NarHash may compress a NAR again without an update of
the narinfo. A matching FileHash saves time: it shows before unpacking that the file is the one that the narinfo means.
"""

import hashlib
from collections.abc import Iterable

from harmonia.errors import FormatError
from harmonia.nix.decompress import MEMORY_BYTES, decompressor
from harmonia.nix.narinfo import NarFile
from harmonia.nix.path_info import PathInfo


class ContentCheck:
    """Verifies a NAR file while it arrives: unpacks it, and compares NarHash and NarSize."""

    def __init__(self, info: PathInfo, nar: NarFile, memory: int = MEMORY_BYTES) -> None:
        self._info = info
        self._decompressor = decompressor(nar.compression, memory)
        self._sha256 = hashlib.sha256()
        self._size = 0

    def update(self, data: bytes) -> None:
        """Unpack the next bytes of the file.

        Raises FormatError if they are malformed or longer than NarSize, WindowError if unpacking takes too much memory.
        """
        for piece in self._decompressor.feed(data):
            self._sha256.update(piece)
            self._size += len(piece)
            if self._size > self._info.nar_size:
                raise FormatError("the unpacked NAR is longer than its NarSize")

    def finish(self) -> None:
        """Raise FormatError if the file is incomplete, or if the NAR has another NarHash or NarSize."""
        if not self._decompressor.whole:
            raise FormatError("the file is truncated")
        if (self._sha256.digest(), self._size) != (self._info.nar_hash, self._info.nar_size):
            raise FormatError("the unpacked NAR has another NarHash or NarSize")


def has_file_hash(info: PathInfo, nar: NarFile, sha256: bytes) -> bool:
    """Return whether the SHA-256 of a file is the one that its narinfo names."""
    return sha256 == (info.nar_hash if nar.compression == "none" else nar.file_hash)


def check_content(info: PathInfo, nar: NarFile, file: Iterable[bytes], memory: int = MEMORY_BYTES) -> None:
    """Raise FormatError if a file does not have the NAR, WindowError if unpacking takes more than `memory` bytes."""
    check = ContentCheck(info, nar, memory)
    for data in file:
        check.update(data)
    check.finish()

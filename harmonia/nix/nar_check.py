"""Check of a NAR file: unpacked, it must have the NarHash and NarSize that the signature of its path covers."""

import hashlib
from collections.abc import Iterator

from harmonia.errors import FormatError
from harmonia.nix.decompress import MEMORY_BYTES, decompressor
from harmonia.nix.path_info import PathInfo


class NarCheck:
    """Unpacks and checks one file, piece by piece."""

    def __init__(self, info: PathInfo, compression: str, memory: int = MEMORY_BYTES) -> None:
        """Start. `compression` is one of COMPRESSIONS, `memory` the maximum number of bytes for its window."""
        self._info = info
        self._decompressor = decompressor(compression, memory)
        self._sha256 = hashlib.sha256()
        self._size = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the NAR's bytes in the next bytes of the file.

        Raises FormatError if they are malformed or longer than NarSize, WindowError if unpacking takes too much memory.
        """
        for piece in self._decompressor.feed(data):
            self._sha256.update(piece)
            self._size += len(piece)
            if self._size > self._info.nar_size:
                raise FormatError("the unpacked NAR is longer than its NarSize")
            yield piece

    def finish(self) -> None:
        """Raise FormatError if the file is incomplete, or if the NAR has another NarHash or NarSize."""
        if not self._decompressor.whole:
            raise FormatError("the file is truncated")
        if (self._sha256.digest(), self._size) != (self._info.nar_hash, self._info.nar_size):
            raise FormatError("the unpacked NAR has another NarHash or NarSize")

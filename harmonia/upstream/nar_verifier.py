"""Verification of downloaded NARs: the unpacked NAR must have the NarHash and NarSize that the signature covers.

FileHash and FileSize are only hints. Caches that name files by NarHash may compress a NAR again without an update of
the narinfo. A matching FileHash saves time: it shows, without unpacking, that the file is the one of the narinfo.
"""

from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from harmonia.errors import FormatError
from harmonia.nix.decompress import LARGE_MEMORY_BYTES, MEMORY_BYTES, WindowError
from harmonia.nix.nar_check import NarCheck
from harmonia.nix.narinfo import NarFile
from harmonia.nix.path_info import PathInfo
from harmonia.process.threads import Threads
from harmonia.upstream.remote_path import RemotePath

_BEGIN_MAX_BYTES = 1 << 20
"""Bytes at the beginning of a passed-through file that stay in memory, to unpack them again with a larger window."""

_T = TypeVar("_T")


def has_file_hash(info: PathInfo, nar: NarFile, sha256: bytes) -> bool:
    """Return True if the SHA-256 of a file is the one that its narinfo names."""
    return sha256 == (info.nar_hash if nar.compression == "none" else nar.file_hash)


def check_content(info: PathInfo, nar: NarFile, file: Iterable[bytes], memory: int = MEMORY_BYTES) -> None:
    """Raise FormatError if a file does not contain the NAR, WindowError if unpacking takes more than `memory` bytes."""
    check = NarCheck(info, nar.compression, memory)
    for data in file:
        _feed(check, data)
    check.finish()


class StreamCheck:
    """A NarCheck of a file that is passed through, in threads.

    A file with a large window is unpacked again with more memory. If another file holds that memory, the check
    fails at once: it does not wait, because the client of the other file may be slow.
    """

    def __init__(self, path: RemotePath, threads: Threads, note: Callable[..., None]) -> None:
        self._path = path
        self._check = NarCheck(path.info, path.nar.compression)
        self._begun = b""
        self._size = 0
        self._threads = threads
        self._has_much_memory = False
        self._note = note

    async def update(self, data: bytes) -> None:
        self._size += len(data)
        if self._size <= _BEGIN_MAX_BYTES:
            self._begun += data
        await self._noted(self._update, data)

    async def finish(self) -> None:
        await self._noted(self._threads.unpack, self._check.finish)
        self._note(failed=False)

    def close(self) -> None:
        if self._has_much_memory:
            self._has_much_memory = False
            self._threads.much_memory.release()

    async def _update(self, data: bytes) -> None:
        try:
            await self._threads.unpack(_feed, self._check, data)
        except WindowError:
            if len(self._begun) < self._size or self._threads.much_memory.locked():
                raise
            await self._threads.much_memory.acquire()
            self._has_much_memory = True
            self._check = NarCheck(self._path.info, self._path.nar.compression, LARGE_MEMORY_BYTES)
            await self._threads.unpack(_feed, self._check, self._begun)

    async def _noted(self, function: Callable[[_T], Awaitable[None]], argument: _T) -> None:
        try:
            await function(argument)
        except FormatError as error:
            self._note(failed=True)
            raise self._path.refuse_nar(error) from None


def _feed(check: NarCheck, data: bytes) -> None:
    for _ in check.feed(data):
        pass

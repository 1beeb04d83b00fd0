"""Build logs, the output of builders, in the log directory of Nix or Hydra.

Nix writes the log of a derivation to `drvs/<first two characters>/<the rest>` or `drvs/<the full base name>` of its log
directory (Nix `src/libstore/local-fs-store.cc`), plain or as `.bz2`, depending on `compress-build-log` at the time of
the build. It creates the file when a build starts, appends until the build ends, and replaces it when the derivation is
built again. Hydra writes to `<first two characters>/<the rest>` of its `build-logs`, and later compresses to `.bz2` or
`.zst` (Hydra `Helper/Nix.pm` and `Plugin/CompressLog.pm`).

A log is served even if its derivation was garbage-collected.
"""

import bz2
import os
import re
import stat
import time
from collections.abc import Generator
from contextlib import suppress
from typing import BinaryIO

import zstandard

from harmonia.errors import FormatError, StoreObjectError
from harmonia.nix.store_path import StorePath
from harmonia.store.file_reader import ReadOnly

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # without O_NONBLOCK, to open a fifo blocks
_SUFFIXES = ("", ".bz2", ".zst")  # in the order of Nix's lookup
_LOG = re.compile(r"(?P<derivation>.+\.drv)(?:\.bz2|\.zst)?")
_DRVS = "drvs"
_CHUNK_BYTES = 256 * 1024
_SETTLED_S = 24 * 60 * 60
"""Seconds without a change after which a plain file counts as finished, because its content does not show it.

A build may be silent for hours. By default, Hydra ends one after two silent hours, or ten hours in total.
"""

# The end of a bzip2 stream: 48 bits of the square root of pi at any bit offset, a checksum of 32 bits, and padding.
_BZ2_END, _BZ2_END_MASK = 0x177245385090, (1 << 48) - 1
_BZ2_END_BYTES = 11

# Four bytes of zstd can decompress to 128 KiB, so each input makes at most 2 MiB. All decoders support this window
# (RFC 9659), and levels up to 19 need no larger one.
_ZST_INPUT_BYTES = 64
_ZST_WINDOW_BYTES = 8 << 20


class BuildLog(ReadOnly):
    """A log at the time of the lookup. `read` fails if the log was replaced since."""

    def __init__(self, path: str, suffix: str) -> None:
        """Open the file to read its version, and close it again.

        Raises OSError if the file does not exist or cannot be read.
        """
        self._path = path
        self._suffix = suffix
        with self._open() as file:
            status = os.fstat(file.fileno())
            self.modified_at = status.st_mtime
            self.version = _version(status)
            """A string that changes with the content of the file."""
            self.finished = self._is_finished(file, status)
            """True if the log is complete."""
        self.size = None if suffix else status.st_size
        """The length of the decoded log in bytes. None for a compressed log until it was read to its end."""

    def read(self, start: int, stop: int | None) -> Generator[bytes]:
        """Yield the decoded bytes from `start` to `stop` or to the end. Yield b"" for each chunk outside this range.

        If Nix is still compressing the log, the bytes end at the last complete block. For all other damage, raises
        StoreObjectError or OSError after the bytes before the damage.
        """
        with self._open() as file:
            if self.finished and _version(os.fstat(file.fileno())) != self.version:
                raise StoreObjectError(f"{self._path} was replaced")
            if not self._suffix:
                yield from self._part(file, start, self.size or 0 if stop is None else stop)
                return
            position = 0
            for chunk in self._unzst(file) if self._suffix == ".zst" else self._unbz2(file):
                end = None if stop is None else stop - position
                yield chunk[max(start - position, 0) : end]
                position += len(chunk)
                if stop is not None and position >= stop:
                    return
            self.size = position

    def _open(self) -> BinaryIO:
        file = os.fdopen(os.open(self._path, _FLAGS), "rb")
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise FileNotFoundError(f"{self._path} is not a regular file")
        return file

    def _is_finished(self, file: BinaryIO, status: os.stat_result) -> bool:
        if self._suffix == ".bz2":
            file.seek(max(status.st_size - _BZ2_END_BYTES, 0))
            end = int.from_bytes(file.read(_BZ2_END_BYTES), "big") >> 32
            return any(end >> shift & _BZ2_END_MASK == _BZ2_END for shift in range(8))
        return self._suffix == ".zst" or time.time() - status.st_mtime > _SETTLED_S

    def _part(self, file: BinaryIO, start: int, stop: int) -> Generator[bytes]:
        file.seek(start)
        while chunk := file.read(min(_CHUNK_BYTES, stop - start)):
            start += len(chunk)
            yield chunk
        if start < stop:
            raise StoreObjectError(f"{self._path} was cut short")

    def _unbz2(self, file: BinaryIO) -> Generator[bytes]:
        decoded = bz2.BZ2File(file)
        try:
            while chunk := decoded.read1(_CHUNK_BYTES):
                yield chunk
        except EOFError:
            if self.finished:
                raise StoreObjectError(f"{self._path} was cut short") from None

    def _unzst(self, file: BinaryIO) -> Generator[bytes]:
        decompressor = zstandard.ZstdDecompressor(max_window_size=_ZST_WINDOW_BYTES)
        frame = decompressor.decompressobj()
        chunk = bytearray()
        try:
            while data := file.read(_ZST_INPUT_BYTES):
                while data:
                    if frame.eof:
                        frame = decompressor.decompressobj()
                    chunk += frame.decompress(data)
                    data = frame.unused_data
                if len(chunk) >= _CHUNK_BYTES:
                    yield bytes(chunk)
                    chunk.clear()
        except zstandard.ZstdError as error:
            raise StoreObjectError(f"{self._path} cannot be decoded: {error}") from None
        if chunk:
            yield bytes(chunk)
        if not frame.eof:
            raise StoreObjectError(f"{self._path} was cut short")


def find_log(directory: str, derivation: StorePath) -> BuildLog | None:
    """Return the log of a derivation in the log directory, or None if there is none.

    Raises OSError if the log exists but cannot be read.
    """
    split = os.path.join(derivation[:2], derivation[2:])
    for name in (os.path.join(_DRVS, split), os.path.join(_DRVS, derivation), split):
        for suffix in _SUFFIXES:
            try:
                return BuildLog(os.path.join(directory, name + suffix), suffix)
            except (FileNotFoundError, NotADirectoryError):
                continue
    return None


def derivation(directory: str, hash_part: str) -> StorePath | None:
    """Return the derivation with this hash part, or None if the log directory has no log of one.

    Raises OSError if the directory cannot be read.
    """
    bucket, drvs = hash_part[:2], os.path.join(directory, _DRVS)
    for place, start in ((os.path.join(drvs, bucket), bucket), (drvs, ""), (os.path.join(directory, bucket), bucket)):
        rest = f"{hash_part}-"[len(start) :]
        with suppress(FileNotFoundError, NotADirectoryError):
            for name in os.listdir(place):
                if name.startswith(rest) and (match := _LOG.fullmatch(start + name)):
                    with suppress(FormatError):
                        return StorePath(match["derivation"])
    return None


def _version(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns:x}-{status.st_size:x}"

"""Pushed build logs, compressed with zstd, in a directory with the layout of Nix's log directory."""

import os
import tempfile
import time
from contextlib import suppress

import zstandard

from harmonia.errors import FormatError, PushRefusedError
from harmonia.nix.content_coding import Decoder
from harmonia.nix.store_path import StorePath

MAX_LOG_BYTES = 256 << 20
"""Maximum length of a log, as text."""

_PREFIX_LENGTH = 2
_PART = ".part"
_PART_MAX_AGE_S = 6 * 60 * 60  # without a write


class IncomingLog:
    """A log that is being received."""

    def __init__(self, path: str, decoder: Decoder | None) -> None:
        """Open a temporary file beside `path`. The decoder undoes the content codings of the body."""
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        self._path = path
        self._decoder = decoder
        self._compressor = zstandard.ZstdCompressor().compressobj()
        self._size = 0
        descriptor, self._temporary = tempfile.mkstemp(_PART, dir=os.path.dirname(path))
        self._file = open(descriptor, "wb")  # noqa: SIM115 (`close` closes it)

    def write(self, data: bytes) -> None:
        """Append bytes of the body. Raises PushRefusedError if the log is too long, or not encoded as announced."""
        try:
            for piece in self._decoder.feed(data) if self._decoder else [data]:
                self._size += len(piece)
                if self._size > MAX_LOG_BYTES:
                    raise PushRefusedError(413, f"the log is longer than {MAX_LOG_BYTES} bytes")
                self._file.write(self._compressor.compress(piece))
        except FormatError as error:
            raise PushRefusedError(400, f"cannot decode the log: {error}") from None

    def keep(self) -> None:
        """Move the complete log to its place, over an older one. Raises PushRefusedError if the body is truncated."""
        if self._decoder is not None and not self._decoder.whole:
            raise PushRefusedError(400, "the encoded log ends early; push it again")
        self._file.write(self._compressor.flush())
        self._file.close()
        os.rename(self._temporary, self._path)

    def close(self) -> None:
        self._file.close()
        with suppress(FileNotFoundError):
            os.unlink(self._temporary)


class LogStore:
    """The logs in a directory."""

    def __init__(self, directory: str, keep_s: float) -> None:
        self.directory = directory
        self._keep_s = keep_s

    def receive(self, derivation: StorePath, decoder: Decoder | None) -> IncomingLog:
        """Return a file to which the log of a derivation is written."""
        prefix, rest = derivation[:_PREFIX_LENGTH], derivation[_PREFIX_LENGTH:]
        return IncomingLog(os.path.join(self.directory, "drvs", prefix, f"{rest}.zst"), decoder)

    def expire(self) -> None:
        """Remove logs that were pushed longer ago than `push.keep`, and partial files of workers that died."""
        now = time.time()
        for folder, _, names in os.walk(os.path.join(self.directory, "drvs")):
            for path in (os.path.join(folder, name) for name in names):
                with suppress(FileNotFoundError):
                    if now - os.stat(path).st_mtime > (_PART_MAX_AGE_S if path.endswith(_PART) else self._keep_s):
                        os.unlink(path)

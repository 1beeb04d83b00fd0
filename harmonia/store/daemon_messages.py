"""Messages of the Nix daemon's worker protocol (Nix `src/libstore/worker-protocol.hh`), without their transport.

Numbers have 8 bytes, little-endian; texts are encoded as in a NAR. Before a response, the daemon may send log messages,
which end with `_LAST` or `_ERROR`.
"""

import struct
from collections.abc import Callable, Iterable

from harmonia.errors import DaemonError, RemoteError
from harmonia.nix import nar

_SENDS_FULL_ERRORS = 0x11A
"""The protocol version since which errors have a level, a name and traces."""
_NEXT, _LAST, _ERROR = 0x6F6C6D67, 0x616C7473, 0x63787470
_START_ACTIVITY, _STOP_ACTIVITY, _RESULT = 0x53545254, 0x53544F50, 0x52534C54
_MAX_TEXT_BYTES = 64 * 1024
_MAX_FIELDS = 1024  # of a log message
_MAX_ITEMS = 1 << 20  # of a list

_number = struct.Struct("<Q")


def numbers(*values: int) -> bytes:
    """Return the encoded numbers."""
    return b"".join(map(_number.pack, values))


def text(value: str) -> bytes:
    """Return the encoded text."""
    return nar.encode(value.encode())


def texts(values: Iterable[str]) -> bytes:
    """Return the encoded list of texts."""
    encoded = [text(value) for value in values]
    return numbers(len(encoded)) + b"".join(encoded)


class IncompleteError(Exception):
    """The rest of a message has not been received."""


class Received:
    """The bytes from the daemon that were received and not dropped, and the position up to which they were parsed.

    The methods for parts of messages raise IncompleteError if a part is not complete, and RemoteError if the daemon
    violates the protocol.
    """

    def __init__(self) -> None:
        self._data = bytearray()
        self._position = 0

    def __len__(self) -> int:
        return len(self._data)

    def append(self, data: bytes) -> None:
        """Append received bytes."""
        self._data += data

    def parse_again(self) -> None:
        """Continue with the first byte that was not dropped."""
        self._position = 0

    def drop_parsed(self) -> None:
        """Drop the bytes that were parsed."""
        del self._data[: self._position]
        self._position = 0

    def number(self, most: int = 2**64 - 1) -> int:
        """Parse a number, which is `most` at most."""
        value: int = _number.unpack(self._bytes(_number.size))[0]
        if value > most:
            raise RemoteError(f"the Nix daemon sent the number {value}, more than the maximum of {most}")
        return value

    def text(self) -> str:
        """Parse a text."""
        size = self.number(_MAX_TEXT_BYTES)
        value = self._bytes(size)
        if any(self._bytes(-size % 8)):
            raise RemoteError("the Nix daemon sent a text with nonzero padding")
        return value.decode(errors="backslashreplace")

    def texts(self) -> list[str]:
        """Parse a list of texts."""
        return [self.text() for _ in range(self.number(_MAX_ITEMS))]

    def log(self, version: int) -> None:
        """Parse and drop the log messages before a response, in a version of the protocol.

        Raises DaemonError if one of them is an error.
        """
        while (kind := self.number()) != _LAST:
            if kind == _ERROR:
                raise DaemonError(f"the Nix daemon reports: {self._error(version)}")
            self._log_message(kind)
            self.drop_parsed()

    def _log_message(self, kind: int) -> None:
        """Parse a log message that is not an error."""
        parts: dict[int, tuple[Callable[[], object], ...]] = {
            _NEXT: (self.text,),
            _START_ACTIVITY: (self.number, self.number, self.number, self.text, self._fields, self.number),
            _STOP_ACTIVITY: (self.number,),
            _RESULT: (self.number, self.number, self._fields),
        }
        if kind not in parts:
            raise RemoteError(f"the Nix daemon sent the unknown message {kind:#x}")
        for part in parts[kind]:
            part()

    def _error(self, version: int) -> str:
        """Parse an error, and return its message."""
        if version < _SENDS_FULL_ERRORS:
            message = self.text()
            self.number()  # exit status
            return message
        self.text()  # type
        self.number()  # level
        self.text()  # name
        message = self.text()
        self.number()  # whether a position follows: never
        for _ in range(self.number(_MAX_ITEMS)):  # traces
            self.number()
            self.text()
        return message

    def _fields(self) -> None:
        """Parse the fields of a log message."""
        for _ in range(self.number(_MAX_FIELDS)):
            if self.number(1):
                self.text()
            else:
                self.number()

    def _bytes(self, size: int) -> bytearray:
        start, self._position = self._position, self._position + size
        if self._position > len(self._data):
            raise IncompleteError
        return self._data[start : self._position]

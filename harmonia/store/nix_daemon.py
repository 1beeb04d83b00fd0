"""The worker protocol of the Nix daemon, as much of it as temporary roots need (Nix `src/libstore/worker-protocol.hh`).

Numbers have 8 bytes, the lowest first; texts are as in a NAR. Each side tells its version, and the lower one holds. An
answer comes after what the daemon has to say meanwhile, which ends with `_LAST` or `_ERROR`.
"""

import socket
import struct
import time
from typing import TYPE_CHECKING, Self

from harmonia.errors import RemoteError
from harmonia.nix import nar

if TYPE_CHECKING:
    from collections.abc import Callable

_OURS, _THEIRS = 0x6E697863, 0x6478696F
_VERSION = 0x125  # 1.37, that of Nix 2.20: the last where nothing more is to be agreed on
_MIN_VERSION = 0x115  # Nix 2.3
_TELLS_NIX_VERSION, _TELLS_TRUST, _TELLS_ERRORS_IN_FULL = 0x121, 0x123, 0x11A
_ADD_TEMP_ROOT = 11
_NEXT, _LAST, _ERROR = 0x6F6C6D67, 0x616C7473, 0x63787470
_START_ACTIVITY, _STOP_ACTIVITY, _RESULT = 0x53545254, 0x53544F50, 0x52534C54
_MAX_TEXT_BYTES = 64 * 1024  # bytes of a text
_MAX_PARTS = 1024  # parts of a message

_number = struct.Struct("<Q")


class Daemon:
    """A connection to the daemon that listens at a unix socket. For one thread at a time.

    To open it, and each question, takes `timeout` seconds at most. OSError, or RemoteError where the daemon refuses, or
    does not answer as it should; then it can only be closed.
    """

    def __init__(self, path: str, timeout: float) -> None:
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(path)
            self._version = self._agree()
        except BaseException:
            self.close()
            raise

    def add_temp_root(self, path: str) -> None:
        """Keep a path, and what it refers to, from being collected until this is closed, or the daemon ends.

        A path that is not valid is kept from the time when it becomes so.
        """
        self._deadline = time.monotonic() + self._timeout
        self._send(_number.pack(_ADD_TEMP_ROOT) + nar.encode(path.encode()))
        self._hear(self._version)
        self._receive_number()

    @property
    def lost(self) -> bool:
        """Whether it is closed, by the daemon or by us, or the daemon says what nobody asked for."""
        try:
            self._socket.setblocking(False)
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _agree(self) -> int:
        """Greet, and return the version that holds."""
        self._send(_number.pack(_OURS) + _number.pack(_VERSION))
        if self._receive_number() != _THEIRS:
            raise RemoteError("what listens there is no Nix daemon")
        version = min(self._receive_number(), _VERSION)
        if version < _MIN_VERSION:
            raise RemoteError("the Nix daemon is older than that of Nix 2.3")
        self._send(_number.pack(0) + _number.pack(0))  # no processor of our own, no space to reserve
        if version >= _TELLS_NIX_VERSION:
            self._receive_text()
        if version >= _TELLS_TRUST:
            self._receive_number()
        self._hear(version)
        return version

    def _hear(self, version: int) -> None:
        """What the daemon has to say before it answers, to its end. RemoteError where that is an error."""
        number, text = self._receive_number, self._receive_text
        while (kind := number()) != _LAST:
            if kind == _ERROR:
                raise RemoteError(f"the Nix daemon says: {self._receive_error(version)}")
            parts: dict[int, tuple[Callable[[], object], ...]] = {
                _NEXT: (text,),
                _START_ACTIVITY: (number, number, number, text, self._skip_fields, number),
                _STOP_ACTIVITY: (number,),
                _RESULT: (number, number, self._skip_fields),
            }
            if kind not in parts:
                raise RemoteError(f"the Nix daemon says {kind:#x}, which is not understood")
            for part in parts[kind]:
                part()

    def _receive_error(self, version: int) -> str:
        if version < _TELLS_ERRORS_IN_FULL:
            message = self._receive_text()
            self._receive_number()
            return message
        self._receive_text()
        self._receive_number()
        self._receive_text()
        return self._receive_text()  # traces follow, for humans who debug Nix

    def _skip_fields(self) -> None:
        for _ in range(self._receive_number(_MAX_PARTS)):
            if self._receive_number(1):
                self._receive_text()
            else:
                self._receive_number()

    def _receive_text(self) -> str:
        size = self._receive_number(_MAX_TEXT_BYTES)
        text = self._receive(size)
        if any(self._receive(-size % 8)):
            raise RemoteError("the Nix daemon pads a text with other bytes than zeros")
        return text.decode(errors="backslashreplace")

    def _receive_number(self, most: int = 2**64 - 1) -> int:
        value: int = _number.unpack(self._receive(_number.size))[0]
        if value > most:
            raise RemoteError(f"the Nix daemon says {value} where {most} is the most that can be")
        return value

    def _receive(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._await()
            part = self._socket.recv(size - len(data))
            if not part:
                raise RemoteError("the Nix daemon hangs up")
            data += part
        return bytes(data)

    def _send(self, data: bytes) -> None:
        self._await()
        self._socket.sendall(data)

    def _await(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._socket.settimeout(left)

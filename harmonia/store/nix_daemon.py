"""Client for the worker protocol of the Nix daemon: GC roots, and imports (Nix `src/libstore/worker-protocol.hh`).

Numbers have 8 bytes, little-endian; texts are encoded as in a NAR. Each side sends its version, and the lower one is
used. Before a response, the daemon may send log messages, which end with `_LAST` or `_ERROR`.

Nothing here needs a trusted user: the daemon itself checks the signatures of what is imported.
"""

import socket
import struct
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Self

from harmonia.errors import DaemonError, RemoteError
from harmonia.nix import nar
from harmonia.nix.path_info import PathInfo

if TYPE_CHECKING:
    from collections.abc import Callable

_CLIENT_MAGIC, _DAEMON_MAGIC = 0x6E697863, 0x6478696F
_VERSION = 0x125  # 1.37, that of Nix 2.20, the last one without a negotiation of features
_MIN_VERSION = 0x115  # Nix 2.3
_SENDS_NIX_VERSION, _SENDS_TRUST, _SENDS_FULL_ERRORS = 0x121, 0x123, 0x11A
_TAKES_FRAMES, _TAKES_JSON = 0x117, 0x11F  # for NARs, since Nix 2.4; for realisations, since Nix 2.4
_ADD_TEMP_ROOT, _ADD_INDIRECT_ROOT = 11, 12
_QUERY_PATH_INFO, _QUERY_VALID_PATHS = 26, 31
_ADD_TO_STORE_NAR, _REGISTER_DRV_OUTPUT = 39, 42
_NEXT, _LAST, _ERROR = 0x6F6C6D67, 0x616C7473, 0x63787470
_START_ACTIVITY, _STOP_ACTIVITY, _RESULT = 0x53545254, 0x53544F50, 0x52534C54
_MAX_TEXT_BYTES = 64 * 1024
_MAX_FIELDS = 1024  # of a log message
_MAX_ITEMS = 1 << 20  # of a list
_MAX_PIPELINED = 64  # requests, so that the daemon can write all responses before the first is read
_FRAME_BYTES = 64 * 1024  # minimum, except for the last frame
_IMPORT_TIMEOUT_S = 3600.0
"""Timeout for the daemon to take the next frame, and to register the path: it may wait for its lock or the disk."""

_number = struct.Struct("<Q")


class Daemon:
    """A connection to the daemon at a unix socket. Not thread-safe.

    The constructor and each request raise OSError if the connection fails or takes longer than `timeout` seconds, and
    RemoteError if the daemon reports an error or violates the protocol. After an error other than DaemonError, the
    connection can only be closed.
    """

    def __init__(self, path: str, timeout: float) -> None:
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._is_out_of_step = False
        self._temp_roots: set[str] = set()
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(path)
            self._version = self._agree()
        except BaseException:
            self.close()
            raise

    def add_temp_roots(self, paths: Iterable[str]) -> None:
        """Call `add_temp_root` for each path that has no root of this connection, several in one round trip."""
        new = [path for path in dict.fromkeys(paths) if path not in self._temp_roots]
        for start in range(0, len(new), _MAX_PIPELINED):
            part = new[start : start + _MAX_PIPELINED]
            self._deadline = time.monotonic() + self._timeout
            self._is_out_of_step = True  # until the last response, even after an error
            self._send(b"".join(_number.pack(_ADD_TEMP_ROOT) + _text(path) for path in part))
            for _ in part:
                self._read_log(self._version)
                self._receive_number()
            self._is_out_of_step = False
            self._temp_roots.update(part)

    def add_temp_root(self, path: str) -> None:
        """Protect a path and its closure from garbage collection until this connection is closed, or the daemon ends.

        If the path is not valid, the protection begins when it becomes valid.
        """
        self._ask(_ADD_TEMP_ROOT, _text(path))
        self._receive_number()

    def add_indirect_root(self, link: str) -> None:
        """Protect the store path that the symlink `link` points to, and its closure, as long as the link exists."""
        self._ask(_ADD_INDIRECT_ROOT, _text(link))
        self._receive_number()

    def query_valid_paths(self, paths: Iterable[str]) -> set[str]:
        """Return those of the paths that are valid."""
        self._ask(_QUERY_VALID_PATHS, _texts(paths) + _number.pack(0))  # without substitution
        return set(self._receive_texts())

    def query_nar_hash(self, path: str) -> bytes | None:
        """Return the SHA-256 of the NAR of a path, or None if the path is not valid."""
        self._ask(_QUERY_PATH_INFO, _text(path))
        if not self._receive_number(1):
            return None
        self._receive_text()  # deriver
        digest = self._receive_text()
        self._receive_texts()  # references
        for _ in ("registration time", "size", "ultimate"):
            self._receive_number()
        self._receive_texts()  # signatures
        self._receive_text()  # content address
        try:
            return bytes.fromhex(digest)
        except ValueError:
            raise RemoteError("the Nix daemon sent a malformed hash") from None

    def add_to_store(self, info: PathInfo, store_dir: str, chunks: Iterable[bytes]) -> None:
        """Import a path with its NAR. The daemon checks the hash, the size, and the signatures or the content address.

        Raises DaemonError if the daemon refuses the path.
        """
        if self._version < _TAKES_FRAMES:
            raise RemoteError("the Nix daemon is older than that of Nix 2.4, and cannot import paths from a push")
        head = _text(f"{store_dir}/{info.path}") + _text(f"{store_dir}/{info.deriver}" if info.deriver else "")
        head += _text(info.nar_hash.hex()) + _texts(f"{store_dir}/{reference}" for reference in info.references)
        head += _number.pack(0) + _number.pack(info.nar_size) + _number.pack(0)  # registration time now; not ultimate
        head += _texts(info.sigs) + _text(info.ca or "") + _number.pack(0) + _number.pack(0)  # no repair; check sigs
        self._deadline = time.monotonic() + self._timeout
        self._is_out_of_step = True  # until the end, even if `chunks` raises an error
        self._send(_number.pack(_ADD_TO_STORE_NAR) + head)
        frame = bytearray()
        for chunk in chunks:
            frame += chunk
            if len(frame) >= _FRAME_BYTES:
                self._send_frame(frame)
                frame.clear()
        if frame:
            self._send_frame(frame)
        self._send(_number.pack(0))
        self._is_out_of_step = False
        self._deadline = time.monotonic() + _IMPORT_TIMEOUT_S
        self._read_log(self._version)

    def register_realisation(self, realisation: str) -> None:
        """Register a realisation, given as the JSON of Nix up to 2.34. The daemon does not check its signatures."""
        if self._version < _TAKES_JSON:
            raise RemoteError("the Nix daemon is older than that of Nix 2.4, and has no realisations")
        self._ask(_REGISTER_DRV_OUTPUT, _text(realisation))

    @property
    def lost(self) -> bool:
        """True if the connection is closed, in the middle of a NAR, or the daemon has sent data without a request."""
        if self._is_out_of_step:
            return True
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
        """Do the handshake, and return the protocol version to use."""
        self._send(_number.pack(_CLIENT_MAGIC) + _number.pack(_VERSION))
        if self._receive_number() != _DAEMON_MAGIC:
            raise RemoteError("the socket's server is not a Nix daemon")
        version = min(self._receive_number(), _VERSION)
        if version < _MIN_VERSION:
            raise RemoteError("the Nix daemon is older than that of Nix 2.3")
        self._send(_number.pack(0) + _number.pack(0))  # no CPU affinity, no reserved space
        if version >= _SENDS_NIX_VERSION:
            self._receive_text()
        if version >= _SENDS_TRUST:
            self._receive_number()
        self._read_log(version)
        return version

    def _ask(self, operation: int, arguments: bytes) -> None:
        self._deadline = time.monotonic() + self._timeout
        self._send(_number.pack(operation) + arguments)
        self._read_log(self._version)

    def _send_frame(self, frame: bytearray) -> None:
        self._deadline = time.monotonic() + _IMPORT_TIMEOUT_S
        self._send(_number.pack(len(frame)) + frame)

    def _read_log(self, version: int) -> None:
        """Read and drop the daemon's log messages before a response.

        Raises DaemonError if one of them is an error.
        """
        number, text = self._receive_number, self._receive_text
        while (kind := number()) != _LAST:
            if kind == _ERROR:
                raise DaemonError(f"the Nix daemon reports: {self._receive_error(version)}")
            parts: dict[int, tuple[Callable[[], object], ...]] = {
                _NEXT: (text,),
                _START_ACTIVITY: (number, number, number, text, self._skip_fields, number),
                _STOP_ACTIVITY: (number,),
                _RESULT: (number, number, self._skip_fields),
            }
            if kind not in parts:
                raise RemoteError(f"the Nix daemon sent the unknown message {kind:#x}")
            for part in parts[kind]:
                part()

    def _receive_error(self, version: int) -> str:
        if version < _SENDS_FULL_ERRORS:
            message = self._receive_text()
            self._receive_number()
            return message
        self._receive_text()
        self._receive_number()
        self._receive_text()
        message = self._receive_text()
        self._receive_number()  # whether a position follows: never
        for _ in range(self._receive_number(_MAX_ITEMS)):  # traces
            self._receive_number()
            self._receive_text()
        return message

    def _skip_fields(self) -> None:
        for _ in range(self._receive_number(_MAX_FIELDS)):
            if self._receive_number(1):
                self._receive_text()
            else:
                self._receive_number()

    def _receive_texts(self) -> list[str]:
        return [self._receive_text() for _ in range(self._receive_number(_MAX_ITEMS))]

    def _receive_text(self) -> str:
        size = self._receive_number(_MAX_TEXT_BYTES)
        text = self._receive(size)
        if any(self._receive(-size % 8)):
            raise RemoteError("the Nix daemon sent a text with nonzero padding")
        return text.decode(errors="backslashreplace")

    def _receive_number(self, most: int = 2**64 - 1) -> int:
        value: int = _number.unpack(self._receive(_number.size))[0]
        if value > most:
            raise RemoteError(f"the Nix daemon sent the number {value}, more than the maximum of {most}")
        return value

    def _receive(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._await()
            part = self._socket.recv(size - len(data))
            if not part:
                raise RemoteError("the Nix daemon closed the connection")
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


def _text(text: str) -> bytes:
    return nar.encode(text.encode())


def _texts(texts: Iterable[str]) -> bytes:
    encoded = [_text(text) for text in texts]
    return _number.pack(len(encoded)) + b"".join(encoded)

"""Client for the worker protocol of the Nix daemon: GC roots, and imports (Nix `src/libstore/worker-protocol.hh`).

Each side sends its version, and the lower one is used. daemon_messages.py encodes and parses the messages.

Nothing here needs a trusted user: the daemon itself checks the signatures of what is imported.

Requests are coroutines. Those of `BlockingDaemon` block instead of waiting for an event loop; `run_blocking` runs them.
"""

import os
import socket
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, Self, TypeVar, cast

from harmonia.errors import DaemonError, RemoteError
from harmonia.nix.path_info import PathInfo
from harmonia.store.daemon_messages import IncompleteError, Received, numbers, text, texts

_CLIENT_MAGIC, _DAEMON_MAGIC = 0x6E697863, 0x6478696F
_VERSION = 0x125  # 1.37, that of Nix 2.20, the last one without a negotiation of features
_MIN_VERSION = 0x115  # Nix 2.3
_SENDS_NIX_VERSION, _SENDS_TRUST = 0x121, 0x123
_TAKES_FRAMES, _TAKES_JSON = 0x117, 0x11F  # for NARs, since Nix 2.4; for realisations, since Nix 2.4
_ADD_TEMP_ROOT, _ADD_INDIRECT_ROOT = 11, 12
_QUERY_PATH_INFO, _QUERY_VALID_PATHS = 26, 31
_ADD_TO_STORE_NAR, _REGISTER_DRV_OUTPUT = 39, 42
_MAX_PIPELINED = 64  # requests, so that the daemon can write all responses before the first is read
_FRAME_BYTES = 64 * 1024  # minimum, except for the last frame
_RECEIVE_BYTES = 64 * 1024
_IMPORT_TIMEOUT_S = 3600.0
"""Timeout for the daemon to take the next frame, and to register the path: it may wait for its lock or the disk."""

CLOSED = "the Nix daemon closed the connection"

_T = TypeVar("_T")


class _Request(NamedTuple):
    message: bytes
    receive: Callable[[], Any]
    """Receives the result, after the log messages."""


class DaemonClient:
    """A connection to the daemon. Not thread-safe. Subclasses send and receive.

    Each request raises OSError if the connection fails or takes too long, and RemoteError if the daemon reports an
    error or violates the protocol. After an error other than DaemonError, the connection can only be closed.
    """

    _version: int

    def __init__(self, path: str, timeout_s: float) -> None:
        """Create the client of the daemon at `path`. The handshake, and each request, may take `timeout_s` seconds."""
        self._collector: socket.socket | None = None
        self._collector_path = os.path.join(os.path.dirname(os.path.dirname(path)), "gc-socket/socket")
        self._timeout_s = timeout_s
        self._restart_timeout(timeout_s)
        self._is_out_of_step = False
        self._temp_roots: set[str] = set()
        self._received = Received()

    async def _send(self, data: bytes) -> None:
        raise NotImplementedError

    async def _receive_more(self) -> None:
        """Wait for more bytes, and append them to `_received`. Raises RemoteError if the daemon has disconnected."""
        raise NotImplementedError

    async def _converse(self, peer: socket.socket, data: bytes) -> bytes:
        """Send bytes to another socket, and return the response, or nothing if it was closed."""
        raise NotImplementedError

    def _restart_timeout(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds

    def _left_s(self) -> float:
        """Return the seconds until the timeout. Raises TimeoutError after it."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        return left

    async def register_roots(self, links: Iterable[str]) -> None:
        """Protect the store paths that symlinks point to, and their closures, as long as the links exist."""
        await self._ask(map(self._indirect_root_request, links))

    async def protect_and_query(self, path: str, references: Sequence[str]) -> tuple[bytes | None, set[str]]:
        """Return the SHA-256 of the NAR of a path, or None if it is not valid, and those references that are valid.

        All of them get temporary roots first. With less than 60 references, and unless a garbage collection runs, this
        is one round trip.
        """
        new = self._without_temp_root((path, *references))
        if new and self._connect_to_collector():
            await self.protect(new)  # before the queries, whose results the daemon remembers
            new = []
        requests = [self._nar_hash_request(path), self._valid_paths_request(references)]
        *_, nar_hash, valid = await self._ask([*map(self._temp_root_request, new), *requests])
        await self._inform_collector(new)
        return nar_hash, set(valid)

    async def protect(self, paths: Iterable[str]) -> None:
        """Protect paths and their closures from garbage collection until this connection is closed, or the daemon ends.

        The protection of a path that is not valid begins when it becomes valid.
        """
        new = self._without_temp_root(paths)
        await self._ask(map(self._temp_root_request, new))
        await self._inform_collector(new)

    async def _inform_collector(self, paths: Sequence[str]) -> None:
        """Inform a garbage collection that is running of temporary roots.

        The daemon should do that. A process of that of Nix 2.8 stops doing it if it once cannot connect, because the
        collection is just starting. Collections that begin later read the roots from a file.
        """
        self._restart_timeout(self._timeout_s)
        while paths and (collector := self._connect_to_collector()):
            with suppress(BrokenPipeError, ConnectionResetError):
                answers = [await self._converse(collector, path.encode() + b"\n") for path in paths]
                if all(answers):
                    return
            self._leave_collector()  # it has ended; perhaps the next one has begun

    def _connect_to_collector(self) -> socket.socket | None:
        """Return a connection to the garbage collection that is running, or None if there is none.

        It stays open, because that of Nix 2.8 may crash after one that is closed at once.
        """
        if self._collector is None:
            collector = socket.socket(socket.AF_UNIX)
            try:
                collector.setblocking(False)
                collector.connect(self._collector_path)
            except OSError:
                collector.close()
            else:
                self._collector = collector
        return self._collector

    def _leave_collector(self) -> None:
        if self._collector is not None:
            self._collector.close()
            self._collector = None

    async def add_to_store(self, info: PathInfo, store_dir: str, chunks: Iterable[bytes], link: str) -> bytes | None:
        """Import a path with its NAR, and protect it as long as the symlink `link`, which points to it, exists.

        The daemon checks the hash, the size, and the signatures or the content address. It does not change a path that
        is valid already. Return the SHA-256 of the NAR of the valid path.
        Raises DaemonError if the daemon refuses the path.
        """
        if self._version < _TAKES_FRAMES:
            raise RemoteError("the Nix daemon is older than that of Nix 2.4, and cannot import paths from a push")
        path = f"{store_dir}/{info.path}"
        head = text(path) + text(f"{store_dir}/{info.deriver}" if info.deriver else "")
        head += text(info.nar_hash.hex()) + texts(f"{store_dir}/{reference}" for reference in info.references)
        head += numbers(0, info.nar_size, 0)  # registration time now; not ultimate
        head += texts(info.sigs) + text(info.ca or "") + numbers(0, 0)  # no repair; check signatures
        self._is_out_of_step = True  # until the last response, even if `chunks` raises an error
        unsent = numbers(_ADD_TO_STORE_NAR) + head
        for frame in _frames(chunks):
            unsent += numbers(len(frame))
            if len(frame) >= _FRAME_BYTES:  # sent without a copy
                self._restart_timeout(_IMPORT_TIMEOUT_S)
                await self._send(unsent)
                await self._send(frame)
                unsent = b""
            else:
                unsent += frame
        end = _Request(unsent + numbers(0), lambda: None)
        requests = end, self._nar_hash_request(path), self._indirect_root_request(link)
        nar_hash: bytes | None
        _, nar_hash, _ = await self._ask(requests, _IMPORT_TIMEOUT_S)
        return nar_hash

    async def agree(self) -> None:
        """Do the handshake."""
        await self._send(numbers(_CLIENT_MAGIC, _VERSION))
        self._version = await self._receive(self._receive_version)
        await self._send(numbers(0, 0))  # no CPU affinity, no reserved space
        await self._receive(self._receive_greeting)
        await self._receive(partial(self._received.log, self._version))

    def _receive_version(self) -> int:
        if self._received.number() != _DAEMON_MAGIC:
            raise RemoteError("the socket's server is not a Nix daemon")
        version = min(self._received.number(), _VERSION)
        if version < _MIN_VERSION:
            raise RemoteError("the Nix daemon is older than that of Nix 2.3")
        return version

    def _receive_greeting(self) -> None:
        if self._version >= _SENDS_NIX_VERSION:
            self._received.text()
        if self._version >= _SENDS_TRUST:
            self._received.number()

    async def _ask(self, requests: Iterable[_Request], timeout_s: float | None = None) -> list[Any]:
        """Send requests, several in one round trip, and return their results.

        If the daemon reports errors, raises the first of them after the last response.
        """
        results = []
        failure: DaemonError | None = None
        waiting = list(requests)
        for start in range(0, len(waiting), _MAX_PIPELINED):
            part = waiting[start : start + _MAX_PIPELINED]
            self._restart_timeout(timeout_s or self._timeout_s)
            self._is_out_of_step = True
            await self._send(b"".join(request.message for request in part))
            for request in part:
                try:
                    results.append(await self._receive(partial(self._receive_response, request)))
                except DaemonError as error:
                    failure = failure or error
                except (OSError, RemoteError) as error:
                    raise (failure or error) from None  # after some errors, the daemon ends
            self._is_out_of_step = False
        if failure is not None:
            raise failure
        return results

    def _receive_response(self, request: _Request) -> Any:  # noqa: ANN401 (depends on the request)
        self._received.log(self._version)
        return request.receive()

    def _without_temp_root(self, paths: Iterable[str]) -> list[str]:
        return [path for path in dict.fromkeys(paths) if path not in self._temp_roots]

    def _temp_root_request(self, path: str) -> _Request:
        return _Request(numbers(_ADD_TEMP_ROOT) + text(path), partial(self._receive_temp_root, path))

    def _receive_temp_root(self, path: str) -> None:
        self._received.number()
        self._temp_roots.add(path)

    def _indirect_root_request(self, link: str) -> _Request:
        return _Request(numbers(_ADD_INDIRECT_ROOT) + text(link), self._received.number)

    def _valid_paths_request(self, paths: Iterable[str]) -> _Request:
        message = numbers(_QUERY_VALID_PATHS) + texts(paths) + numbers(0)  # without substitution
        return _Request(message, self._received.texts)

    def _nar_hash_request(self, path: str) -> _Request:
        return _Request(numbers(_QUERY_PATH_INFO) + text(path), self._receive_nar_hash)

    def _receive_nar_hash(self) -> bytes | None:
        """Receive the info of a path, and return the SHA-256 of its NAR, or None if the path is not valid."""
        if not self._received.number(1):
            return None
        self._received.text()  # deriver
        digest = self._received.text()
        self._received.texts()  # references
        for _ in ("registration time", "size", "ultimate"):
            self._received.number()
        self._received.texts()  # signatures
        self._received.text()  # content address
        try:
            return bytes.fromhex(digest)
        except ValueError:
            raise RemoteError("the Nix daemon sent a malformed hash") from None

    async def _receive(self, parse: Callable[[], _T]) -> _T:
        """Return the result of `parse`, which is called again from the start until enough has been received."""
        while True:
            try:
                result = parse()
            except IncompleteError:
                self._received.parse_again()
            except DaemonError:
                self._received.drop_parsed()
                raise
            else:
                self._received.drop_parsed()
                return result
            await self._receive_more()


class BlockingDaemon(DaemonClient):
    """A connection whose requests block: `run_blocking` runs its coroutines."""

    def __init__(self, path: str, timeout: float) -> None:
        """Connect to the unix socket `path`. Each request may take `timeout` seconds. Raises errors like a request."""
        super().__init__(path, timeout)
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(path)
            run_blocking(self.agree())
        except BaseException:
            self.close()
            raise

    def add_temp_roots(self, paths: Iterable[str]) -> None:
        """Like `protect`."""
        run_blocking(self.protect(paths))

    def add_indirect_roots(self, links: Iterable[str]) -> None:
        """Protect the store paths that symlinks point to, and their closures, as long as the links exist."""
        run_blocking(self.register_roots(links))

    def query_valid_paths(self, paths: Sequence[str]) -> set[str]:
        """Return those of the paths that are valid."""
        (valid,) = run_blocking(self._ask([self._valid_paths_request(paths)]))
        return set(valid)

    def register_realisation(self, realisation: str) -> None:
        """Register a realisation, given as the JSON of Nix up to 2.34. The daemon does not check its signatures."""
        if self._version < _TAKES_JSON:
            raise RemoteError("the Nix daemon is older than that of Nix 2.4, and has no realisations")
        run_blocking(self._ask([_Request(numbers(_REGISTER_DRV_OUTPUT) + text(realisation), lambda: None)]))

    @property
    def lost(self) -> bool:
        """True if the connection is closed, in the middle of a NAR, or the daemon has sent data without a request."""
        if self._is_out_of_step or self._received:
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
        self._leave_collector()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _send(self, data: bytes) -> None:
        self._socket.settimeout(self._left_s())
        self._socket.sendall(data)

    async def _receive_more(self) -> None:
        self._socket.settimeout(self._left_s())
        part = self._socket.recv(_RECEIVE_BYTES)
        if not part:
            raise RemoteError(CLOSED)
        self._received.append(part)

    async def _converse(self, peer: socket.socket, data: bytes) -> bytes:
        peer.settimeout(self._left_s())
        peer.sendall(data)
        return peer.recv(1)


def run_blocking(steps: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine that never waits for an event loop, and return its result."""
    try:
        steps.send(None)
    except StopIteration as ended:
        return cast("_T", ended.value)
    raise AssertionError("a coroutine waits without an event loop")


def _frames(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Join chunks to frames, none of which may be empty: an empty frame would be the end of the NAR."""
    frame = bytearray()
    for chunk in chunks:
        if not frame and len(chunk) >= _FRAME_BYTES:
            yield chunk
            continue
        frame += chunk
        if len(frame) >= _FRAME_BYTES:
            yield bytes(frame)
            frame.clear()
    if frame:
        yield bytes(frame)

"""A running Harmonia: the real process, its log, and a client for raw HTTP."""

import ast
import http.client
import os
import re
import select
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import zstandard

from harmonia.cache.zstd import Encoding
from harmonia.config.tables.zstd import Zstd
from harmonia.nix import base32
from harmonia.nix.path_info import PathInfo
from harmonia.tools.fixture_tree import Sparse
from harmonia.tools.store_builder import StoreBuilder
from support import preloaded

PATIENCE_S = 120.0
"""Timeout in seconds for anything that happens at once on an idle machine: only a bound against hangs."""
LONG_GRACE = "shutdown_grace = 600"
"""The setting of a server that would stop only after PATIENCE_S if it waited for its grace period."""
HARMONIA = preloaded.HARMONIA
_SOCKET_PATH_MAX_BYTES = 107
NO_CACHE = Path("/proc/none")
"""A directory that nobody can create, not even root."""


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    """Fields by lower-case name, without Date. A repeated field fails the test."""
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()


class Server:
    """A server for the store in `store` (`nix/store` and `nix/var/nix/db/db.sqlite`), with additional `settings`."""

    def __init__(
        self,
        directory: Path,
        store: Path,
        settings: str = "",
        *,
        bind: str = "127.0.0.1:0",
        workers: int = 1,
        cache_dir: Path | None = None,
        environment: Mapping[str, str] | None = None,
        program: Sequence[str] = HARMONIA,
        client_certificate: Path | None = None,
        **process: object,
    ) -> None:
        directory.mkdir()
        self._program = program
        self.client_certificate = client_certificate
        """A file with certificate and key that the clients of this server present."""
        self.directory = directory
        self.cache_dir = cache_dir or directory / "cache"
        self.config = directory / "harmonia.toml"
        if (
            len(f"{store}/nix/var/nix/daemon-socket/socket") > _SOCKET_PATH_MAX_BYTES
            and "daemon_socket" not in settings
        ):
            settings = f'daemon_socket = ""\n{settings}'  # otherwise the length of a test's name decides what is logged
        self.config.write_text(
            f"bind = {bind!r}\nworkers = {workers}\nreal_nix_store = '{store}/nix/store'\n"
            f"nix_db_path = '{store}/nix/var/nix/db/db.sqlite'\ncache_dir = '{self.cache_dir}'\n{settings}\n"
        )
        self.environment = {**os.environ, **(environment or {})}
        self._workers = workers
        self._options = process
        self._log: list[str] = []
        self._unfinished = b""
        """The beginning of the next line."""
        self._stderr: int | None = None
        self._reading = threading.Lock()
        self.process: subprocess.Popen[str]

    def start(self) -> None:
        """Start the process, and wait until all workers are ready: an earlier SIGHUP, for example, would reach some."""
        if self._workers == 1 or "NOTIFY_SOCKET" in self.environment:
            self._start()
            return
        with ServiceManager(f"@harmonia-{os.getpid()}-{id(self)}") as manager:
            self.environment |= manager.environment
            self._start()
            del self.environment["NOTIFY_SOCKET"]
            assert manager.receive() == "READY=1"

    def _start(self) -> None:
        self.launch()
        self.url = self.wait_for_log(r"serving .* at ([^\s\"]+)")[1]
        for _ in pauses(self.log):
            if self._answers():
                return

    def launch(self) -> None:
        """Start the process, without waiting for success."""
        command = [*self._program, "--config", str(self.config)]
        self.process = preloaded.popen(
            command, env=self.environment, stderr=subprocess.PIPE, text=True, **self._options
        )
        assert self.process.stderr is not None
        self._stderr = self.process.stderr.fileno()
        self._reader = threading.Thread(target=self._read_to_end, args=(self._stderr,))
        self._reader.start()

    def _answers(self) -> bool:
        try:
            return self.get("/version").status == 200
        except OSError:
            assert self.process.poll() is None, self.log
            return False

    @property
    def log(self) -> list[str]:
        """Return the lines of the log, with all that the server wrote before this call."""
        with self._reading:
            self._read_log()
        return self._log

    def _read_to_end(self, stderr: int) -> None:
        """Read the log as it is written, so that the pipe never becomes full."""
        while self._stderr is not None:
            select.select([stderr], [], [])
            with self._reading:
                self._read_log()

    def _read_log(self) -> None:
        """Read what is in the pipe now."""
        while self._stderr is not None and select.select([self._stderr], [], [], 0)[0]:
            data = os.read(self._stderr, 1 << 16)
            if not data:
                self._stderr, data = None, b"\n" if self._unfinished else b""
            *lines, self._unfinished = (self._unfinished + data).split(b"\n")
            self._log += [f"{line.decode()}\n" for line in lines]

    def wait_for_log(self, pattern: str, seconds: float = PATIENCE_S) -> re.Match[str]:
        """Wait for a log line that matches; return the match."""
        missing = f"no {pattern!r} in"
        for _ in pauses(missing, self._log, seconds=seconds):
            has_ended = self.process.poll() is not None  # before its last lines are read
            for line in list(self.log):
                if match := re.search(pattern, line):
                    return match
            assert not has_ended, f"ended with {missing} {self._log}"
        raise AssertionError

    def stop(self, number: int = signal.SIGTERM, seconds: float = PATIENCE_S) -> int:
        """Send a signal, wait for the end, and return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.wait(seconds)

    def wait(self, seconds: float = PATIENCE_S) -> int:
        """Wait for the end, and return the exit status. Kill the process, and fail, if it does not end in time."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the server did not end within {seconds:g} s") from None
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self._reader.join()
            assert self.process.stderr is not None
            self.process.stderr.close()
        return status

    def settle(self) -> None:
        """Wait until the only worker has noticed the end of each connection that was closed before."""
        with self.connect() as connection:
            connection.sendall(b"GET /version HTTP/1.1\r\nHost: cache\r\nConnection: close\r\n\r\n")
            while connection.recv(4096):
                pass

    @property
    def workers(self) -> list[int]:
        """Return the process ids of the workers."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    @contextmanager
    def connect(self, timeout: float = PATIENCE_S, *, receive_buffer: int | None = None) -> Iterator[socket.socket]:
        """Open a connection. `receive_buffer` limits the bytes that arrive before they are read."""
        target: str | tuple[str, int]
        if self.url.startswith("unix:"):
            connection, target = socket.socket(socket.AF_UNIX), self.url.removeprefix("unix:")
        else:
            address = urlsplit(self.url)
            assert address.hostname
            assert address.port
            target = (address.hostname, address.port)
            family = socket.getaddrinfo(*target, type=socket.SOCK_STREAM)[0][0]
            connection = socket.socket(family)
        with connection:
            connection.settimeout(timeout)
            if receive_buffer:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            connection.connect(target)
            if self.url.startswith("https:"):
                context = ssl.create_default_context()
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
                if self.client_certificate is not None:
                    context.load_cert_chain(self.client_certificate)
                with context.wrap_socket(connection) as secured:
                    yield secured
            else:
                yield connection

    def request(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, *, version: str = "1.1"
    ) -> Answer:
        """Send one request on its own connection, with exactly this head."""
        with self.connect() as connection:
            connection.sendall(_head(method, path, {"Connection": "close", **(headers or {})}, version))
            return read_answer(connection, method)

    def post(self, path: str, body: bytes, headers: Mapping[str, str] | None = None, *, version: str = "1.1") -> Answer:
        """Send one request with a body on its own connection."""
        sent = {"Connection": "close", "Content-Length": str(len(body)), **(headers or {})}
        with self.connect() as connection:
            connection.sendall(_head("POST", path, sent, version) + body)
            return read_answer(connection, "POST")

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        return self.request("GET", path, headers)

    def head(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        return self.request("HEAD", path, headers)


class Session:
    """A client that keeps its connection to a server: for many requests, at a quarter of the processor time."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._stack = ExitStack()
        self._connection: socket.socket | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._connection = None

    def request(self, method: str, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        if self._connection is None:
            self._connection = self._stack.enter_context(self._server.connect())
        self._connection.sendall(_head(method, path, headers or {}))
        answer = read_answer(self._connection, method)
        if answer.headers["connection"] == "close":
            self.__exit__()
        return answer

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        return self.request("GET", path, headers)

    def head(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        return self.request("HEAD", path, headers)


def _head(method: str, path: str, headers: Mapping[str, str], version: str = "1.1") -> bytes:
    lines = [f"{method} {path} HTTP/{version}", "Host: cache", *map(": ".join, headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


@contextmanager
def case(*values: object) -> Iterator[None]:
    """Name the values of a case in a failure: for tests with more cases than are worth an item each."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"case: {', '.join(map(repr, values))}")
        raise


@dataclass(frozen=True)
class Sample:
    """A store with a small path, and a path larger than any buffer."""

    root: Path
    small: PathInfo
    big: PathInfo

    @classmethod
    def make(cls, root: Path, size: int = 16 << 20) -> "Sample":
        store = StoreBuilder(root)
        big = store.add(store.output_path("big"), Sparse(size))
        return cls(root, store.add_text("small", b"small\n"), big)


class ServiceManager:
    """A fake service manager: provides the notify socket, and receives the notifications."""

    def __init__(self, address: str) -> None:
        """Bind to `address`: a path, or the name of an abstract socket after an @."""
        self.environment = {"NOTIFY_SOCKET": address}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def drain(self) -> None:
        """Drop the received datagrams."""
        self._socket.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                self._socket.recv(4096)

    def receive(self, seconds: float = PATIENCE_S) -> str:
        """Return the next datagram. Raises TimeoutError if none arrives."""
        self._socket.settimeout(seconds)
        return self._socket.recv(4096).decode()


def unpacked(encoded: bytes) -> bytes:
    """Return the content of zstd frames. Fails if a frame is damaged or truncated."""
    content = bytearray()
    while encoded:
        frame = zstandard.ZstdDecompressor().decompressobj()
        content += frame.decompress(encoded)
        assert frame.eof
        encoded = frame.unused_data
    return bytes(content)


def nar_url(info: PathInfo) -> str:
    return f"/nar/{info.path.hash_part}-{base32.encode(info.nar_hash)}.nar"


class _Existing(ast.NodeTransformer):
    """Read each attribute before its assignment, so that the assignment fails if the attribute does not exist."""

    def visit_Assign(self, node: ast.Assign) -> list[ast.stmt]:
        assigned = (each for target in node.targets for each in ast.walk(target) if isinstance(each, ast.Attribute))
        reads = [ast.parse(ast.unparse(each)).body[0] for each in assigned if isinstance(each.ctx, ast.Store)]
        return [*reads, node]


def existing(statements: str) -> str:
    """Return the statements, changed to raise AttributeError if they patch a missing name."""
    return ast.unparse(_Existing().visit(ast.parse(statements)))


def patched(statements: str) -> list[str]:
    """Return a command that changes the program by `statements`, then runs it.

    It is for changes without a setting: constants of minutes, and failures that cannot be caused from outside.
    """
    return [*preloaded.PATCHED, f"{existing(statements)}\nfrom harmonia.cli import main\nmain()"]


KNOWN_LENGTHS = patched("from harmonia.server.http import response; response._LENGTH_WAIT_S = 600.0")
"""A server whose ranges wait for the length of a body. By default, they wait 0.25 s, too short on a busy machine."""


NO_SMALL_NARS = patched("from harmonia.cache import nar_compressor\nnar_compressor._MAX_SMALL_BYTES = 0")
"""A server that keeps no small compressed NARs in memory, so that it compresses them again, and then has files."""


FROZEN_RATES = "from harmonia.server.http.rate_limit import Rate\nRate.__init__.__defaults__ = (lambda: 1000.0,)\n"
"""Statements for `patched`: rate limits permit nothing more later, however long a test takes."""


def file_url(info: PathInfo, name: str = Encoding.of(Zstd()).name) -> str:
    """Return the URL path of the NAR in a zstd encoding: by default, that of the default settings."""
    return f"{nar_url(info).removesuffix('.nar')}-{name}.nar.zst"


@contextmanager
def download(server: Server, info: PathInfo) -> Iterator[http.client.HTTPResponse]:
    """Yield a response whose head has arrived, while most of the body waits for the client to read."""
    with server.connect(receive_buffer=8192) as connection:
        connection.sendall(f"GET {nar_url(info)} HTTP/1.1\r\nHost: cache\r\n\r\n".encode())
        with http.client.HTTPResponse(connection) as response:
            response.begin()
            yield response


def open_files(pid: int) -> list[str]:
    """Return the names of the open files of a process, which may close some meanwhile."""
    names = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            names.append(os.readlink(descriptor))
    return names


def lock_holders(file: Path) -> set[int]:
    """Return the processes that hold a lock of a file (proc_locks(5))."""
    inode = file.stat().st_ino
    locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return {int(pid) for *_, pid, locked, _, _ in locks if locked.endswith(f":{inode}")}


def peak_bytes(pid: int) -> int:
    """Return the peak memory of a process."""
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(peak[1]) * 1024 if peak else 0


def wait_until(condition: Callable[[], object], seconds: float = PATIENCE_S) -> None:
    for _ in pauses(f"not within {seconds} s", seconds=seconds):
        if condition():
            return


def pauses(*why: object, seconds: float = PATIENCE_S) -> Iterator[None]:
    """Yield at intervals that grow to 100 ms. Fail, with the reason `why`, after `seconds`."""
    deadline, pause = time.monotonic() + seconds, 0.002
    while True:
        yield
        assert time.monotonic() < deadline, why
        time.sleep(pause)
        pause = min(1.3 * pause, 0.1)


def wait_until_refused(server: Server) -> None:
    """Wait until no process of the server accepts connections: each closes its own copy of the listening socket."""

    def refused() -> bool:
        try:
            server.get("/version")
        except ConnectionRefusedError:
            return True
        except (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError):  # accepted just before the end
            return False
        return False

    wait_until(refused)


def read_answer(connection: socket.socket, method: str = "GET") -> Answer:
    """Read one response from a connection. Raises http.client.IncompleteRead if its body breaks off."""
    response = http.client.HTTPResponse(connection, method=method)
    response.begin()
    headers: dict[str, str] = {}
    for name, value in response.getheaders():
        assert name.lower() not in headers, f"repeated field {name}"
        headers[name.lower()] = value
    headers.pop("date", None)  # changes every second
    return Answer(response.status, headers, response.read())


def run(*arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command of Harmonia to its end."""
    return _run(arguments, environment, text=True)


def run_binary(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run a command of Harmonia to its end, with bytes as input and output."""
    return _run(arguments, stdin=subprocess.PIPE, input_=stdin)


def _run(
    arguments: Sequence[str],
    environment: Mapping[str, str] | None = None,
    input_: bytes | None = None,
    **options: object,
) -> subprocess.CompletedProcess[Any]:
    command = [*HARMONIA, *arguments]
    pipe = subprocess.PIPE
    with preloaded.popen(
        command, env={**os.environ, **(environment or {})}, stdout=pipe, stderr=pipe, **options
    ) as process:
        try:
            stdout, stderr = process.communicate(input_, timeout=PATIENCE_S)
        finally:
            process.kill()
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)

"""Servers to compare: they serve the same store, or copies of its NARs.

`BENCH_OTHER` is the command of one more server, and `BENCH_OTHER_NAME` its name. In the command, {root} stands for the
directory with `nix/store` and `nix/var`, {store} and {database} for the store and database in it, {port} for the port,
and {config} for a TOML file with all of these, which Rust Harmonia reads as well.
"""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.client import Address
from benchmarks.store import BenchStore
from harmonia.nix.path_info import PathInfo
from harmonia.server.resources.narinfo import nar_url
from support.ports import ReservedPort

OTHER = os.environ.get("BENCH_OTHER")
OTHER_NAME = os.environ.get("BENCH_OTHER_NAME", "other")
HARMONIA = "Harmonia"
_PATIENCE = 60  # seconds until a server answers


@dataclass(frozen=True)
class Server:
    """A running server."""

    name: str
    address: Address
    pid: int
    behind: "Server | None" = None
    """The server behind this one, if this is a proxy."""

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self.address)

    @property
    def processes(self) -> list[int]:
        """PIDs of the main process and its children, and those of the server behind it."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [self.pid, *map(int, children.split()), *(self.behind.processes if self.behind else ())]

    @property
    def seconds(self) -> float:
        """CPU time of all processes so far."""
        ticks = 0
        for pid in self.processes:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory(self, what: str) -> list[int]:
        """Return the memory of each process in bytes: `Rss`, or `Pss`, which divides shared pages between processes."""
        texts = (Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in self.processes)
        return [int(re.search(rf"^{what}: *(\d+) kB", text, re.MULTILINE)[1]) * 1024 for text in texts]  # type: ignore[index]

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path) as answer:
            content: bytes = answer.read()
        return content

    def nar(self, info: PathInfo) -> str:
        """Return the path in the URL of the narinfo."""
        lines = dict(line.split(": ", 1) for line in self.get(narinfo(info)).decode().splitlines() if ": " in line)
        return f"/{lines['URL']}"


def narinfo(info: PathInfo) -> str:
    return f"/{info.path.hash_part}.narinfo"


def nar(info: PathInfo) -> str:
    """Return the path of the plain NAR on Harmonia, and on servers with copies of its responses."""
    return f"/{nar_url(info)}"


@contextmanager
def harmonia(
    store: BenchStore, settings: str = "", *, database: Path | None = None, workers: int = 1
) -> Iterator[Server]:
    """Start a new Harmonia with an empty cache."""
    with (
        tempfile.TemporaryDirectory(dir=store.root.parent) as directory,
        _harmonia(directory, store, settings, database, workers) as server,
    ):
        yield server


@contextmanager
def behind_nginx(store: BenchStore) -> Iterator[Server]:
    """Start a new Harmonia with an empty cache behind nginx, which sends its cached files itself."""
    with tempfile.TemporaryDirectory(dir=store.root.parent) as directory:
        settings = "nar_compression = 'zstd'\nnginx_location = '/nar-files/'\ntrusted_proxies = ['127.0.0.1']"
        with _harmonia(directory, store, settings) as behind:
            passed_on = (
                "proxy_http_version 1.1; proxy_set_header Connection ''; proxy_set_header Host $http_host;"
                " proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for; proxy_buffering off;"
                " proxy_buffer_size 64k; proxy_buffers 4 64k;"
            )
            server = (
                f"location / {{ proxy_pass http://cache; {passed_on}"
                " proxy_set_header X-Sendfile-Type X-Accel-Redirect; }\n"
                f"location /nar-files/ {{ internal; alias {directory}/nar/; etag off;"
                " add_header ETag $upstream_http_etag; error_page 403 404 = @bytes; }\n"
                f"location @bytes {{ proxy_pass http://cache$request_uri; {passed_on} }}"
            )
            upstream = f"upstream cache {{ server 127.0.0.1:{behind.address[1]}; keepalive 32; }}\n"
            with _nginx(server, 1, upstream) as front:
                yield replace(front, name=HARMONIA, behind=behind)


@contextmanager
def _harmonia(
    directory: str, store: BenchStore, settings: str, database: Path | None = None, workers: int = 1
) -> Iterator[Server]:
    with ReservedPort() as reserved:
        port = reserved.number
        config = _config(directory, store, port, database, workers, f"cache_dir = '{directory}'\n{settings}\n")
        with _running(HARMONIA, [sys.executable, "-m", "harmonia", "--config", str(config)], port) as server:
            _wait_ready(server)
            yield server


def _wait_ready(server: Server) -> None:
    """Wait for a response: a server listens before its workers have started, and their start is a figure of its own."""
    server.get("/nix-cache-info")


def _config(directory: str, store: BenchStore, port: int, database: Path | None, workers: int, rest: str = "") -> Path:
    config = Path(directory, "harmonia.toml")
    config.write_text(
        f"bind = '127.0.0.1:{port}'\nworkers = {workers}\nreal_nix_store = '{store.real_dir}'\n"
        f"nix_db_path = '{database or store.database}'\nsign_key_paths = ['{store.key_file}']\n{rest}"
    )
    return config


@contextmanager
def nginx(files: Path, workers: int = 1) -> Iterator[Server]:
    """Start nginx with a static cache, as `nix copy --to file://` creates it."""
    with _nginx(f"root {files};", workers) as server:
        yield server


@contextmanager
def _nginx(server: str, workers: int, http: str = "") -> Iterator[Server]:
    """Start nginx with these lines in its only `server`, and `http` around it."""
    with ReservedPort() as reserved, tempfile.TemporaryDirectory() as directory:
        port = reserved.number
        temporary = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        config = Path(directory, "nginx.conf")
        config.write_text(
            f"daemon off; worker_processes {workers}; pid {directory}/pid; error_log {directory}/error.log;\n"
            "events { worker_connections 1024; }\n"
            "http { access_log off; sendfile on; tcp_nopush on; keepalive_requests 100000000;\n"
            f"{' '.join(f'{each}_temp_path {directory}/{each};' for each in temporary)}\n"
            f"{http}server {{ listen 127.0.0.1:{port}; {server} }} }}\n"
        )
        if os.geteuid() == 0:  # nginx's worker would be nobody, who cannot read our home
            config.write_text(f"user root;\n{config.read_text()}")
        with _running("nginx", ["nginx", "-c", str(config)], port) as running:
            yield running


@contextmanager
def other(store: BenchStore, *, database: Path | None = None, workers: int = 1) -> Iterator[Server]:
    assert OTHER
    with ReservedPort() as reserved, tempfile.TemporaryDirectory() as directory:
        port = reserved.number
        config = _config(directory, store, port, database, workers)
        words = {"root": store.root, "store": store.real_dir, "port": port, "config": config}
        words["database"] = database or store.database
        with _running(OTHER_NAME, [word.format(**words) for word in shlex.split(OTHER)], port) as server:
            _wait_ready(server)
            yield server


@contextmanager
def plain_socket(file: str) -> Iterator[Server]:
    """Start the upper limit of speed: a socket that sends the file by sendfile(2) to every client."""
    with ReservedPort() as reserved:
        port = reserved.number
        with _running("plain socket", [sys.executable, "-m", "benchmarks.servers", str(port), file], port) as server:
            yield server


@contextmanager
def _running(name: str, command: Sequence[str], port: int) -> Iterator[Server]:
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            deadline = time.monotonic() + _PATIENCE
            while not _listens(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    sys.exit(f"{name} does not answer: {shlex.join(command)}\n{log.read()}")
                time.sleep(0.005)
            yield Server(name, ("127.0.0.1", port), process.pid)
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


def _listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def copied(store: BenchStore, suffix: str) -> Path:
    """Return a directory with Harmonia's responses for the store as files, with NARs of this suffix.

    The copies are created once and kept, because the bytes are always the same.
    """
    files = store.root / f"copies{suffix or '-plain'}"
    if files.exists():
        return files
    print(f"copying NARs to {files}", flush=True)
    unfinished = files.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "nar").mkdir(parents=True)
    with harmonia(store, f"nar_compression = '{'zstd' if suffix else 'none'}'") as server:
        for info in (*store.closure, store.many, store.large):
            # Download the NAR first, because its narinfo has FileSize only afterwards.
            urllib.request.urlretrieve(server.url + nar(info) + suffix, f"{unfinished}{nar(info)}{suffix}")
            (unfinished / narinfo(info)[1:]).write_bytes(server.get(narinfo(info)))
            if (named := server.nar(info)) != nar(info) + suffix:  # the URL of the narinfo names the encoding
                os.link(f"{unfinished}{nar(info)}{suffix}", f"{unfinished}{named}")
        (unfinished / "nix-cache-info").write_bytes(server.get("/nix-cache-info"))
    unfinished.rename(files)
    return files


def _serve(port: int, path: str) -> None:
    with socket.create_server(("127.0.0.1", port)) as listening, open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        while True:
            connection, _ = listening.accept()
            with connection:
                while connection.recv(65536):
                    connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n".encode())
                    connection.sendfile(file)
                    file.seek(0)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), sys.argv[2])

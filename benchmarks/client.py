"""Benchmark client: downloads and discards bodies without decompressing them.

Runs in its own process, with a thread for each keep-alive connection. Small responses are measured with `wrk` instead,
because this client would be slower than the servers.
"""

import json
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

_BUFFER = 1 << 20  # bytes
_SLOW_BUFFER = 64 * 1024
_SLOW_PAUSE = 1 / 16  # seconds between buffers: 1 MiB/s
_COMMAND = [sys.executable, "-m", "benchmarks.client"]

Address = tuple[str, int]


class Connection:
    def __init__(self, address: Address, *, slow: bool = False) -> None:
        self._socket = socket.socket()
        if slow:  # keep little data in the kernel
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SLOW_BUFFER)
        self._socket.connect(tuple(address))  # JSON turns the tuple into a list
        self._stream = self._socket.makefile("rb")
        self._buffer = memoryview(bytearray(_SLOW_BUFFER if slow else _BUFFER))
        self._pause = _SLOW_PAUSE if slow else 0.0

    def get(self, path: str, headers: Mapping[str, str]) -> int:
        """Return the length of the body in bytes. Raises OSError if it is truncated or the status is an error."""
        lines = [f"GET {path} HTTP/1.1", "Host: cache", *(f"{name}: {value}" for name, value in headers.items())]
        self._socket.sendall("\r\n".join([*lines, "", ""]).encode())
        status, *fields = iter(lambda: self._stream.readline().decode().strip().lower(), "")
        if status.split()[1] not in {"200", "206"}:
            raise OSError(f"{path}: {status}")
        length = dict(line.split(": ", 1) for line in fields).get("content-length")
        if length is not None:
            return self._drain(int(length))
        size = 0
        while chunk := int(self._stream.readline(), 16):
            size += self._drain(chunk)
            self._stream.readline()
        self._stream.readline()
        return size

    def _drain(self, size: int) -> int:
        left = size
        while left:
            count = self._stream.readinto(self._buffer[:left])
            if not count:
                raise OSError("the body ends early")
            left -= count
            if self._pause:
                time.sleep(self._pause)
        return size


@dataclass(frozen=True)
class Downloads:
    """Downloads of each path once, over a number of connections."""

    address: Address
    paths: Sequence[str]
    connections: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)

    def run(self) -> tuple[float, int]:
        """Run the downloads. Return the seconds they took, and the total length of the bodies in bytes."""
        done = subprocess.run(_COMMAND, input=json.dumps(asdict(self)), stdout=subprocess.PIPE, text=True, check=True)
        seconds, size = json.loads(done.stdout)
        return seconds, size

    @contextmanager
    def going_on_slowly(self) -> Iterator[None]:
        """Download in the background, 1 MiB/s on each connection."""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen([*_COMMAND, "slowly"], text=True, **pipes) as process:  # type: ignore[call-overload]
            process.stdin.write(json.dumps(asdict(self)))
            process.stdin.close()
            process.stdout.readline()
            try:
                yield
            finally:
                process.kill()


@dataclass(frozen=True)
class Rate:
    """Result of `wrk`."""

    per_second: float
    """Responses per second."""
    p50: float
    """Median seconds until a response."""
    p99: float
    """99th percentile of the seconds until a response."""


_WRK = """
local paths = {}
for line in io.lines(%s) do paths[#paths + 1] = line end
local headers = {%s}
local number = 0
request = function()
  number = number + 1
  headers["Number"] = %s
  return wrk.format("GET", paths[number %% #paths + 1], headers)
end
done = function(summary, latency)
  local result = {summary.requests, summary.duration, latency:percentile(50), latency:percentile(99)}
  io.write("\\n[" .. table.concat(result, ",") .. "]")
end
"""


def ask(
    address: Address,
    paths: Sequence[str],
    connections: int,
    seconds: int,
    headers: Mapping[str, str] | None = None,
    *,
    numbered: bool = False,
) -> Rate:
    """Request the paths in a loop, each connection as fast as the server responds, and ignore the status.

    If they are `numbered`, no request is in the same words as another.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script, tempfile.NamedTemporaryFile("w") as lines:
        lines.write("\n".join(paths))
        lines.flush()
        fields = ", ".join(f"[{json.dumps(name)}]={json.dumps(value)}" for name, value in (headers or {}).items())
        script.write(_WRK % (json.dumps(lines.name), fields, "number" if numbered else "nil"))
        script.flush()
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}", "-s", script.name, "http://{}:{}".format(*address)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    requests, duration, p50, p99 = json.loads(output.splitlines()[-1])
    return Rate(requests / duration * 1e6, p50 / 1e6, p99 / 1e6)


def _download(downloads: Downloads, *, slow: bool) -> None:
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for path in downloads.paths:
        waiting.put(path)
    connections = [Connection(downloads.address, slow=slow) for _ in range(downloads.connections)]
    sizes = []

    def work(connection: Connection) -> None:
        try:
            while True:
                sizes.append(connection.get(waiting.get_nowait(), downloads.headers))
        except queue.Empty:
            pass

    threads = [threading.Thread(target=work, args=(connection,)) for connection in connections]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    if slow:
        print(flush=True)
    for thread in threads:
        thread.join()
    if len(sizes) < len(downloads.paths):
        sys.exit("not all paths were downloaded")
    print(json.dumps([time.perf_counter() - began, sum(sizes)]))


if __name__ == "__main__":
    _download(Downloads(**json.load(sys.stdin)), slow=sys.argv[1:] == ["slowly"])

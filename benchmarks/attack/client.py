"""Clients in separate processes: attackers, and the bystander that they must not disturb.

The bystander has its own address, 127.0.0.2. It sends requests at fixed times, on several connections, and waiting
counts from the time when a request was due: a server that hangs for a second delays a hundred responses, not one.
Requests during a pause of the whole machine do not count. In a pause, a thread that only sleeps does not wake.
"""

import http.client
import multiprocessing
import random
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count, cycle
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import Any
from urllib.parse import urlsplit

_PROCESSES = multiprocessing.get_context("spawn")
_INTERVAL_S = 0.01  # between requests of the bystander
_CONNECTIONS = 16  # of the bystander, so that a response of 100 ms delays no other request
_PAUSE_S = 0.2  # a sleeping thread that wakes so late was halted; a busy machine delays it by some 10 ms
_PATIENCE_S = 120.0  # timeout of one response
_BYSTANDER = "127.0.0.2"
_PROBE_S = 0.5


Request = tuple[str, Mapping[str, str]]
"""Path and headers of a GET request."""


@dataclass(frozen=True)
class Target:
    """Address of a server. Passed to child processes."""

    url: str

    def connect(self, source: str = "127.0.0.1", receive_buffer: int | None = None) -> socket.socket:
        """Open a TCP connection, without a TLS handshake."""
        connection = socket.socket()
        connection.settimeout(_PATIENCE_S)
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.bind((source, 0))
        address = urlsplit(self.url)
        connection.connect((address.hostname, address.port))
        return connection

    def http(self, source: str = "127.0.0.1") -> http.client.HTTPConnection:
        """Return an HTTP connection, which opens at the first request."""
        address = urlsplit(self.url)
        assert address.hostname
        options: dict[str, Any] = {"timeout": _PATIENCE_S, "source_address": (source, 0)}
        if address.scheme == "https":
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            return http.client.HTTPSConnection(address.hostname, address.port, context=context, **options)
        return http.client.HTTPConnection(address.hostname, address.port, **options)


@dataclass(frozen=True)
class Asked:
    """One request of the bystander."""

    due: float
    """Scheduled time on the monotonic clock, which all processes share."""
    seconds: float
    outcome: str
    """Status, or name of the error."""

    def overlaps(self, begin: float, end: float) -> bool:
        """Return True if the request was due or in progress at any time between `begin` and `end`."""
        return self.due < end and begin < self.due + self.seconds


@dataclass
class Bystander:
    """Well-behaved client that requests narinfos at fixed intervals."""

    target: Target
    paths: Sequence[str]
    headers: Mapping[str, str] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    """All requests, except those during a pause of the machine. Filled when `asking` ends."""

    @contextmanager
    def asking(self) -> Iterator[None]:
        receiver, sender = _PROCESSES.Pipe(duplex=False)
        stop, ready = _PROCESSES.Event(), _PROCESSES.Event()
        process = _PROCESSES.Process(
            target=_ask, args=(self.target, self.paths, self.headers, stop, ready, sender), daemon=True
        )
        process.start()
        ready.wait(_PATIENCE_S)
        try:
            yield
        finally:
            stop.set()
            self.asked = receiver.recv()
            process.join()


def _ask(
    target: Target, paths: Sequence[str], headers: Mapping[str, str], stop: Event, ready: Event, sender: Connection
) -> None:
    asked: list[Asked] = []
    pauses: list[tuple[float, float]] = []
    began = time.monotonic()

    def watch() -> None:
        last = began
        while not stop.is_set():
            time.sleep(_INTERVAL_S)
            now = time.monotonic()
            if now - last > _PAUSE_S:
                pauses.append((last, 2 * now - last))  # and as long again, for the requests that were due meanwhile
            last = now

    def work(number: int) -> None:
        connection = target.http(_BYSTANDER)
        for turn, path in zip(count(number, _CONNECTIONS), cycle(paths), strict=False):
            due = began + turn * _INTERVAL_S
            time.sleep(max(due - time.monotonic(), 0))
            if stop.is_set():
                break
            outcome = _outcome(connection, path, headers)
            asked.append(Asked(due, time.monotonic() - due, outcome))
            if len(asked) >= _CONNECTIONS:  # all are connected
                ready.set()
        connection.close()

    with ThreadPoolExecutor(_CONNECTIONS + 1) as threads:
        for worker in [threads.submit(watch), *(threads.submit(work, number) for number in range(_CONNECTIONS))]:
            worker.result()
    sender.send([each for each in asked if not any(each.overlaps(*pause) for pause in pauses)])


def _outcome(connection: http.client.HTTPConnection, path: str, headers: Mapping[str, str]) -> str:
    """Send a request and read the whole response. Return its status, or the name of the error."""
    try:
        connection.request("GET", path, headers=dict(headers))
        answer = connection.getresponse()
        while answer.read(1 << 16):
            pass
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        return type(error).__name__
    return str(answer.status)


Attack = Callable[..., None]
"""Function of an attack. Its arguments: a Target, its own arguments, an event that tells it to stop, and counters."""


@contextmanager
def going_on(attack: Attack, url: str, *arguments: object) -> Iterator[Counter[str]]:
    """Run an attack in a new process until the end of `with`. Fills the yielded counters at the end."""
    receiver, sender = _PROCESSES.Pipe(duplex=False)
    stop = _PROCESSES.Event()
    process = _PROCESSES.Process(target=_attack, args=(attack, Target(url), arguments, stop, sender), daemon=True)
    process.start()
    receiver.recv()  # wait until the attack begins
    counts: Counter[str] = Counter()
    try:
        yield counts
    finally:
        stop.set()
        counts.update(receiver.recv())
        process.join()


def _attack(attack: Attack, target: Target, arguments: Sequence[object], stop: Event, sender: Connection) -> None:
    counts: Counter[str] = Counter()
    sender.send("begun")
    try:
        attack(target, *arguments, stop, counts)
    finally:
        sender.send(counts)


def hammer(
    target: Target,
    requests: Sequence[Request],
    connections: int,
    stop: Event,
    counts: Counter[str],
) -> None:
    """Send random requests on that many connections, each as fast as the server responds."""

    def work(chance: random.Random) -> None:
        connection = target.http()
        while not stop.is_set():
            path, headers = chance.choice(requests)
            outcome = _outcome(connection, path, headers)
            counts[outcome] += 1
            if outcome == "429":
                stop.wait(0.01)
        connection.close()

    _in_threads(work, connections, stop)


def _in_threads(work: Callable[[random.Random], None], count: int, stop: Event) -> None:
    threads = [threading.Thread(target=work, args=(random.Random(number),), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    stop.wait()
    for thread in threads:
        thread.join(_PROBE_S)


def read_slowly(target: Target, path: str, connections: int, stop: Event, counts: Counter[str]) -> None:
    """Send a request on each of the connections, and read at most 1 KiB of each response every 0.2 s."""
    opened = [target.connect(receive_buffer=4096) for _ in range(connections)]
    for connection in opened:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: cache\r\n\r\n".encode())
        connection.setblocking(False)
    begun: set[socket.socket] = set()
    while not stop.wait(0.2):
        for connection in opened:
            with suppress(OSError):
                if data := connection.recv(1024):
                    counts["bytes read"] += len(data)
                    if connection not in begun:
                        begun.add(connection)
                        counts[data.split(b" ", 2)[1].decode()] += 1
    for connection in opened:
        connection.close()


def hold(target: Target, beginning: bytes, drip: bytes, connections: int, stop: Event, counts: Counter[str]) -> None:
    """Open that many connections, send `beginning`, then `drip` every second, and never finish a request."""
    opened: list[socket.socket] = []
    for _ in range(connections):
        if stop.is_set():
            break
        try:
            connection = target.connect()
            connection.setblocking(False)
            connection.send(beginning)
        except OSError as error:
            counts[type(error).__name__] += 1
        else:
            opened.append(connection)
            counts["opened"] += 1
    while not stop.wait(1):
        for connection in list(opened):
            if _is_ended(connection, drip):
                opened.remove(connection)
                counts["ended by the server"] += 1
    for connection in opened:
        counts["open at the end"] += 1
        connection.close()


def _is_ended(connection: socket.socket, drip: bytes) -> bool:
    try:
        if drip:
            connection.send(drip)
        while True:
            if not connection.recv(4096):
                return True
    except BlockingIOError:
        return False
    except OSError:
        return True

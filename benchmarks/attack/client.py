"""Clients in processes of their own: attackers, and the bystander that they must not disturb.

The bystander has an address of its own, 127.0.0.2. It asks at fixed times, on several connections, and a wait counts
from the time when the request was due: a server that stands still for a second delays a hundred answers, not one.
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
_CONNECTIONS = 16  # of the bystander: an answer of 100 ms delays no other request
_PATIENCE_S = 120.0  # for one answer
_BYSTANDER = "127.0.0.2"
_PROBE_S = 0.5


Request = tuple[str, Mapping[str, str]]
"""A path and headers, to be asked for by GET."""


@dataclass(frozen=True)
class Target:
    """Where a server is. Children get it as an argument."""

    url: str

    def connect(self, source: str = "127.0.0.1", receive_buffer: int | None = None) -> socket.socket:
        """Return a connection, without its TLS handshake."""
        connection = socket.socket()
        connection.settimeout(_PATIENCE_S)
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.bind((source, 0))
        address = urlsplit(self.url)
        connection.connect((address.hostname, address.port))
        return connection

    def http(self, source: str = "127.0.0.1") -> http.client.HTTPConnection:
        """Return a connection for requests, opened when it is used first."""
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
    """By the monotonic clock, which all processes share."""
    seconds: float
    outcome: str
    """The status, or the name of the error."""


@dataclass
class Bystander:
    """A client that goes on asking for narinfos, until the end of `with`."""

    target: Target
    paths: Sequence[str]
    headers: Mapping[str, str] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    """All requests, known at the end."""

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
    began = time.monotonic()

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

    with ThreadPoolExecutor(_CONNECTIONS) as threads:
        for worker in [threads.submit(work, number) for number in range(_CONNECTIONS)]:
            worker.result()
    sender.send(asked)


def _outcome(connection: http.client.HTTPConnection, path: str, headers: Mapping[str, str]) -> str:
    """Ask, read the whole answer, and return its status or the error."""
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
"""It gets a Target, its own arguments, an event that is set when it should end, and where to count."""


@contextmanager
def going_on(attack: Attack, url: str, *arguments: object) -> Iterator[Counter[str]]:
    """Run an attack in a process of its own until the end of `with`; then its counts are there."""
    receiver, sender = _PROCESSES.Pipe(duplex=False)
    stop = _PROCESSES.Event()
    process = _PROCESSES.Process(target=_attack, args=(attack, Target(url), arguments, stop, sender), daemon=True)
    process.start()
    receiver.recv()  # it has begun
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
    """Ask for the requests at random on so many connections, each as fast as it is answered."""

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
    """Ask on so many connections, and read some bytes of each answer now and then."""
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
    """Open so many connections, send `beginning` on each, then `drip` each second, and never finish a request."""
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

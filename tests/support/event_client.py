"""A client of `/events`, which reads server-sent events as browsers parse them."""

import http.client
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from support.running import PATIENCE_S, Server


class Received(NamedTuple):
    number: int
    name: str
    data: dict[str, Any]


class EventClient:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.response = response
        self.last = -1
        """The last event id."""
        self.comments = 0

    def block(self) -> list[str]:
        """Return the lines of the next block, empty at the end of the stream."""
        lines = []
        while line := self.response.readline().decode():
            if line == "\n":
                break
            lines.append(line.rstrip("\n"))
        return lines

    def next(self) -> Received | None:
        """Return the next event, or None at the end of the stream. Fails if the response is another one."""
        assert self.response.status == 200, (self.response.status, self.response.read())
        while lines := self.block():
            self.comments += any(line.startswith(":") for line in lines)
            assert all(": " in line or line.startswith(":") for line in lines), lines
            fields = dict(line.split(": ", 1) for line in lines if not line.startswith(":"))
            self.last = int(fields.get("id", self.last))
            if "data" in fields:
                return Received(self.last, fields["event"], json.loads(fields["data"]))
        return None

    def until(self, name: str, **expected: object) -> Received:
        """Return the next event with this name and these data. Fails after PATIENCE_S."""
        deadline = time.monotonic() + PATIENCE_S
        seen = []
        while event := self.next():
            if event.name == name and expected.items() <= event.data.items():
                return event
            seen.append(event)
            assert time.monotonic() < deadline, seen
        raise AssertionError(f"the stream ended without {name}: {seen}")


@contextmanager
def follow(
    server: Server,
    query: str = "",
    headers: Mapping[str, str] | None = None,
    *,
    path: str = "/events",
    receive_buffer: int | None = None,
) -> Iterator[EventClient]:
    """Open a stream, and wait until it records events."""
    with server.connect(receive_buffer=receive_buffer) as connection:
        lines = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        connection.sendall(f"GET {path}{query} HTTP/1.1\r\nHost: cache\r\n{lines}\r\n".encode())
        with http.client.HTTPResponse(connection) as response:
            response.begin()
            client = EventClient(response)
            if response.status == 200:
                first = client.block()
                assert first[0].startswith("retry: ")
                client.last = int(first[1].removeprefix("id: "))
            yield client

"""The private parts of Sanic and uvloop that `server/http/sanic_adapter.py` and `request_head.py` use exist.

If an upgrade removes one, the test of that name fails, before anything fails in a way that is hard to understand.
"""

import asyncio
import inspect
import socket
from functools import cache
from operator import attrgetter

import pytest
import uvloop
from sanic import Request, Sanic
from sanic.application.state import ApplicationServerInfo, ApplicationState
from sanic.http import Http, Stage
from sanic.http.constants import HTTP
from sanic.models.server_types import ConnInfo
from sanic.response import HTTPResponse
from sanic.server.async_server import AsyncioServer
from sanic.server.protocols.http_protocol import HttpProtocol


@cache
def names(kind: type) -> set[str]:
    """Return the attributes of a class and of its instances: annotated, in slots, or assigned in its source."""
    assigned: set[str] = set()
    for each in kind.__mro__[:-1]:
        slots = getattr(each, "__slots__", ())
        assigned |= {slots} if isinstance(slots, str) else set(slots)
        assigned |= set(getattr(each, "__annotations__", ()))
        if each.__module__ == "builtins":
            continue
        words = inspect.getsource(each).replace("(", " ").split()
        assigned |= {word.removeprefix("self.").rstrip(":,)") for word in words if word.startswith("self.")}
    return assigned | set(dir(kind))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((Http, name) for name in (
            "HEADER_MAX_SIZE", "_receive_more", "expecting_continue", "head_only", "http1_request_header",
            "keep_alive", "perft0", "protocol", "recv_buffer", "request", "request_body", "request_bytes_left",
            "response", "stage", "upgrade_websocket", "url",
        )),
        *((HttpProtocol, name) for name in (
            "HTTP_CLASS", "_can_write", "_http", "_time", "abort", "app", "close", "conn_info", "connection_lost",
            "connection_made", "data_received", "http", "loop", "recv_buffer", "send", "transport",
        )),
        *((Request, name) for name in (
            "ctx", "head", "raw_url", "respond", "responded", "stream", "transport", "version",
        )),
        *((ConnInfo, name) for name in ("client_ip", "server", "ssl")),
        *((HTTPResponse, name) for name in ("body", "processed_headers", "send", "status")),
        *((AsyncioServer, name) for name in ("app", "close", "connections", "start_serving", "startup")),
        *((ApplicationState, name) for name in ("primary", "server_info")),
        (ApplicationServerInfo, "settings"),
        (Stage, "HANDLER"),
        (Stage, "IDLE"),
        (Stage, "REQUEST"),
        (HTTP, "VERSION_1"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)  # fmt: skip
def test_sanic_has_the_attribute(kind: type, name: str) -> None:
    assert name in names(kind)


@pytest.mark.parametrize("name", ["connect_accepted_socket", "add_reader", "add_signal_handler"])
def test_uvloop_has_the_method(name: str) -> None:
    assert hasattr(uvloop.Loop, name)


def test_transport_of_uvloop_exposes_its_socket() -> None:
    """The descriptor shows how many bytes the client has not taken yet (TIOCOUTQ)."""

    async def descriptor() -> int:
        ours, theirs = socket.socketpair()
        with theirs:
            transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=ours)
            number: int = transport.get_extra_info("socket").fileno()
            transport.close()
            return number

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(descriptor()) >= 0


def test_sanic_accepts_the_options_we_use() -> None:
    options = {"handler", "uri", "methods", "name", "strict_slashes"}
    assert options <= inspect.signature(Sanic.add_route).parameters.keys()
    assert {"sock", "protocol", "backlog", "asyncio_server_kwargs"} <= inspect.signature(
        Sanic.create_server
    ).parameters.keys()
    assert attrgetter("error_handler.add")(Sanic("internals", configure_logging=False))

"""One worker process: it serves the listening sockets until SIGTERM, then lets running downloads end."""

import asyncio
import ctypes
import logging
import os
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import uvloop
from sanic.models.server_types import Signal
from sanic.server.async_server import AsyncioServer

from harmonia.cache.disk_cache import sweep_all
from harmonia.config import credentials
from harmonia.config.settings import Settings
from harmonia.errors import ConfigError
from harmonia.process.sockets import BACKLOG, connection_limit, enable_keepalive
from harmonia.server.app import create_app, create_metrics_app
from harmonia.server.connections import ConnectionLimiter, TlsListener
from harmonia.server.context import ServerContext
from harmonia.server.http.auth import Guard
from harmonia.server.http.sanic_adapter import Connection, limited_connection
from harmonia.server.resources import metrics, upstream

# The interpreter's lock goes to another thread after this time, not after 0.005 s. The event loop takes the lock anew
# for each connection that is ready: with 1 ms and four threads that compute, narinfos waited for 1 s.
_SWITCH_INTERVAL_S = 0.0002
_TRIM_INTERVAL_S = 10.0  # seconds between two times that memory is given back
_DRAIN_POLL_S = 0.05  # seconds between two looks for connections that have become idle, while we stop

_log = logging.getLogger("harmonia")


def run(
    context: ServerContext,
    for_metrics: Sequence[socket.socket],
    place: int,
    listening: Sequence[socket.socket],
    lifeline: socket.socket,
    heartbeat: float,
) -> None:
    """What a worker of the supervisor does. It tells of nothing but metrics where it listens for them."""
    context.metrics.adopt_slot(place)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(context, for_metrics, listening, lifeline, heartbeat))


async def _serve(
    context: ServerContext,
    for_metrics: Sequence[socket.socket],
    listening: Sequence[socket.socket],
    lifeline: socket.socket,
    heartbeat: float,
) -> None:
    settings = context.settings
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    tls: ssl.SSLContext | None = None
    guard: Guard | None = None
    # Before the first read, to miss no change.
    reload_wanted = asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, reload_wanted.set)
    tls = credentials.tls_context(settings)
    lifeline.setblocking(False)
    loop.add_reader(lifeline, os._exit, 1)  # nothing is ever sent on it: the main process is gone

    guard = Guard(settings) if settings.tokens_path is not None else None
    app = create_app(context, guard)
    metrics_app = create_metrics_app(context)
    limiter = ConnectionLimiter(
        connection_limit(settings.max_connections),
        context.metrics.own,
        settings.max_connections_per_client,
        settings.trusted_proxies,
    )
    protocol = limited_connection(limiter)
    servers = []
    tls_listeners: dict[AsyncioServer, TlsListener] = {}
    for each in listening:
        enable_keepalive(each)
        private = each in for_metrics
        server = await (metrics_app if private else app).create_server(
            sock=each,
            protocol=Connection if private else protocol,  # who watches gets in where nobody else does
            backlog=BACKLOG,
            asyncio_server_kwargs={"start_serving": False},
        )
        assert server is not None  # noqa: S101 (its type allows for a way of old)
        servers.append(server)
        if tls is not None and each.family != socket.AF_UNIX and not private:
            make = partial(protocol, loop=loop, app=app, signal=Signal(), connections=server.connections)
            tls_listeners[server] = TlsListener(each, make, tls, limiter, settings.header_timeout)
    await upstream.start(context)
    for server in {server.app: server for server in servers}.values():
        await server.startup()  # type: ignore[no-untyped-call]
    for server in servers:
        if server in tls_listeners:
            tls_listeners[server].start()
        else:
            await server.start_serving()  # type: ignore[no-untyped-call]
    if context.debug_info is not None:
        context.debug_info.start()
    context.threads.readers.submit(sweep_all, str(settings.cache_dir))  # what a worker left that was killed
    reloading = _reload_when(reload_wanted, lambda: _reload(settings, tls, guard))
    chores = [
        asyncio.create_task(chore)
        for chore in (_heartbeat(context, lifeline, heartbeat), _trim_heap(context), reloading)
    ]
    await stop.wait()
    for listener in tls_listeners.values():
        listener.close()
    await _drain(servers, settings.shutdown_grace)
    for chore in chores:
        chore.cancel()
    await upstream.stop(context)


async def _heartbeat(context: ServerContext, lifeline: socket.socket, heartbeat: float) -> None:
    while True:
        metrics.sample(context)
        with suppress(BlockingIOError):  # the main process is behind: it has enough signs of life to read
            lifeline.send(b".")
        await asyncio.sleep(heartbeat)


async def _trim_heap(context: ServerContext) -> None:
    """Return freed heap to the OS periodically. Without this, glibc keeps the peak of the busiest moment."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    while malloc_trim is not None:
        await asyncio.sleep(_TRIM_INTERVAL_S)
        with suppress(RuntimeError):  # no thread can be started
            await context.threads.run_io(partial(malloc_trim, 0))


async def _drain(servers: Sequence[AsyncioServer], grace: float) -> None:
    """Accept no more, close whatever does not answer a request, and give the rest `grace` seconds."""
    for server in servers:
        server.close()  # type: ignore[no-untyped-call]
    loop = asyncio.get_running_loop()
    deadline = loop.time() + grace
    while open_connections := [connection for server in servers for connection in server.connections]:
        late = loop.time() >= deadline
        for connection in open_connections:
            if late:
                connection.abort()
            elif connection.http:  # it answers a request, which is to be its last
                connection.http.keep_alive = False
            else:
                connection.close()
        await asyncio.sleep(_DRAIN_POLL_S)


async def _reload_when(wanted: asyncio.Event, reload: Callable[[], None]) -> None:
    """Reload in a thread of its own, so that requests go on, once for all signals that come before it begins."""
    while True:
        await wanted.wait()
        wanted.clear()
        await asyncio.to_thread(reload)


def _reload(settings: Settings, tls: ssl.SSLContext | None, guard: Guard | None) -> None:
    """Read the certificate again, for connections yet to come, and the tokens. What is broken leaves the old in place.

    Certificates of those who vouch for clients stay: OpenSSL can add some to a context, but take none away.
    """
    if tls is not None:
        try:
            credentials.tls_context(settings)  # into a context of its own first, so that nothing is half replaced
            tls.load_cert_chain(str(settings.tls_cert_path), settings.tls_key_path)
        except (ConfigError, OSError) as error:
            _log.error("the TLS certificate is not read again: %s", error)
        else:
            _log.info("the TLS certificate was read again")
    if guard is not None:
        try:
            guard.read()
        except ConfigError as error:
            _log.error("the tokens are not read again: %s", error)
        else:
            _log.info("the tokens were read again")

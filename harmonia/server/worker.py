"""Worker process: serves the listening sockets until SIGTERM, then finishes running downloads."""

import asyncio
import ctypes
import gc
import importlib
import logging
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from threading import Thread

import uvloop
from sanic.models.server_types import Signal
from sanic.server.async_server import AsyncioServer

from harmonia.cache.disk_cache import sweep_all
from harmonia.config import credentials
from harmonia.config.optional_packages import require_zeroconf
from harmonia.config.settings import Settings
from harmonia.errors import ConfigError
from harmonia.metrics.shared_counters import WorkerCounters
from harmonia.mirror.connection import open_presigner
from harmonia.nix.signing import SecretKey
from harmonia.process.sockets import BACKLOG, connection_limit, enable_keepalive
from harmonia.process.supervisor import beat_while_alive
from harmonia.server import cache_warmer, mirror_writer
from harmonia.server.app import create_app, create_metrics, create_metrics_app
from harmonia.server.connections import ConnectionLimiter, TlsListener, limited_connection
from harmonia.server.context import ServerContext
from harmonia.server.http.auth import Guard
from harmonia.server.http.sanic_adapter import Connection
from harmonia.server.resources import metrics
from harmonia.upstream.tasks import Tasks

# A computing thread releases the GIL after this time; Python's default is 0.005 s. The event loop acquires it again
# for each connection that is ready: with 1 ms and four computing threads, narinfos waited for 1 s.
_SWITCH_INTERVAL_S = 0.0002
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_REUSED_BUFFER_BYTES = 1 << 20  # more than a chunk of any body
# New objects between two garbage collections; Python's default is 700. Each cached path makes some, so that collections
# took a tenth of the time of new narinfos. Few objects are in cycles, which only a collection frees.
_GC_OBJECTS = 10_000
_TRIM_INTERVAL_S = 10.0  # between two returns of freed heap to the OS
_DRAIN_POLL_S = 0.05  # between two checks for idle connections during the shutdown

_Start = Callable[[ServerContext], tuple[Thread, Callable[[], object]]]
"""Starts a thread for the work of a process. Returns it, and a function to call with each heartbeat."""

_log = logging.getLogger("harmonia")


def prepare(settings: Settings, keys: Sequence[SecretKey]) -> ServerContext:
    """Create what all workers share. Call it before the fork."""
    if settings.mirror.is_read or settings.mirror.write_served:
        open_presigner(settings)  # to stop the start if it fails; the workers open their own
    if settings.asks_upstreams:  # takes half a second and 9 MiB: only if needed
        importlib.import_module("harmonia.server.resources.upstream_fallback")
    if settings.lan.announce or settings.lan.public_keys:
        require_zeroconf()
        importlib.import_module("harmonia.upstream.siblings")
    return ServerContext(settings, keys, create_metrics(settings))


def run(
    context: ServerContext,
    for_metrics: Sequence[socket.socket],
    slot: int,
    listening: Sequence[socket.socket],
    lifeline: socket.socket,
    heartbeat_s: float,
) -> None:
    """Run the process of a slot in the shared metrics until SIGTERM: a worker, or in a later slot a side process.

    The sockets in `for_metrics`, a part of `listening`, serve only metrics. The process sends a heartbeat on `lifeline`
    every `heartbeat_s` seconds, and exits when the supervisor's end closes.
    """
    settings = context.settings
    context.metrics.adopt_slot(slot)
    if slot >= settings.workers:
        for each in listening:
            each.close()
        start = _side_processes(settings)[slot - settings.workers]
        thread, sample = start(context)
        beat_while_alive(thread, lifeline, heartbeat_s, sample)
        return
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    _reuse_freed_memory()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(context, for_metrics, slot, listening, lifeline, heartbeat_s))


def _side_processes(settings: Settings) -> list[_Start]:
    """Return the functions that start the work of the processes after the workers (see `Settings.processes`)."""
    starts: list[_Start] = []
    if settings.warm == "new":
        starts.append(cache_warmer.start)
    if settings.mirror.write_served:
        starts.append(mirror_writer.start)
    return starts


async def _serve(
    context: ServerContext,
    for_metrics: Sequence[socket.socket],
    slot: int,
    listening: Sequence[socket.socket],
    lifeline: socket.socket,
    heartbeat_s: float,
) -> None:
    settings = context.settings
    loop = asyncio.get_running_loop()
    context.threads.start()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    # Before the certificate and the tokens are read the first time, so that no change is missed.
    reload_wanted = asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, reload_wanted.set)
    tls = credentials.tls_context(settings)
    _note_loaded(context.metrics.own, settings, tls)
    lifeline.setblocking(False)
    loop.add_reader(lifeline, os._exit, 1)  # the supervisor never sends anything: readable means that it has ended
    guard = context.guard = _guard(context)
    servers, tls_listeners = await _create_servers(context, guard, tls, listening, for_metrics)
    if settings.asks_upstreams:
        from harmonia.server.resources.upstream_fallback import UpstreamHandlers  # noqa: PLC0415 (takes 0.5 s)

        context.upstreams = UpstreamHandlers(context)
    for server in {server.app: server for server in servers}.values():
        await server.startup()  # type: ignore[no-untyped-call]
    gc.freeze()  # otherwise, a full garbage collection visits all modules, and no request is served for 30 ms
    gc.set_threshold(_GC_OBJECTS)
    for server in servers:
        if server in tls_listeners:
            tls_listeners[server].start()
        else:
            await server.start_serving()  # type: ignore[no-untyped-call]
    if context.debug_info is not None:
        context.debug_info.start()
    siblings = AsyncExitStack()
    _start_siblings(context, slot, [each for each in listening if each not in for_metrics], siblings)
    context.threads.readers.submit(sweep_all, str(settings.cache_dir))  # removes the temporary files of killed workers
    reload = partial(_reload, context, tls_listeners.values(), guard)
    reloading = _reload_when(reload_wanted, reload, context.events.end_streams)
    running = [_heartbeat(context, lifeline, heartbeat_s), _trim_heap(context), reloading]
    if context.push is not None:
        running.append(context.push.run_maintenance())
    chores = Tasks()
    for chore in running:
        chores.spawn(chore)
    await stop.wait()
    for listener in tls_listeners.values():
        listener.close()
    context.events.close()
    await _drain(servers, settings.shutdown_grace)
    await chores.stop()
    context.close()
    await siblings.aclose()
    if context.upstreams is not None:
        await context.upstreams.close()


def _guard(context: ServerContext) -> Guard | None:
    needed = context.settings.tokens_path is not None or context.settings.push.enable
    return Guard(context.settings, context.metrics.own.token_uses) if needed else None


def _start_siblings(
    context: ServerContext, slot: int, listening: Sequence[socket.socket], closing: AsyncExitStack
) -> None:
    """Announce this server, in its first worker, and ask siblings, as far as the settings say so."""
    lan = context.settings.lan
    if not (lan.announce or lan.public_keys):
        return
    from harmonia.upstream.siblings import Siblings, addresses_of  # noqa: PLC0415 (zeroconf is optional)

    siblings = Siblings(context.identity)
    closing.push_async_callback(siblings.close)
    announced = addresses_of(listening) if lan.announce and slot == 0 else None
    siblings.start(announced, context.upstreams.add_sibling if context.upstreams and lan.public_keys else None)


async def _create_servers(
    context: ServerContext,
    guard: Guard | None,
    tls: ssl.SSLContext | None,
    listening: Sequence[socket.socket],
    for_metrics: Sequence[socket.socket],
) -> tuple[list[AsyncioServer], dict[AsyncioServer, TlsListener]]:
    """Create a server for each socket, and a listener for those whose connections use TLS. None accepts yet."""
    settings, loop = context.settings, asyncio.get_running_loop()
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
            protocol=Connection if private else protocol,  # no connection limit for monitoring
            backlog=BACKLOG,
            asyncio_server_kwargs={"start_serving": False},
        )
        assert server is not None  # noqa: S101 (Optional only for a deprecated call style)
        servers.append(server)
        if tls is not None and each.family != socket.AF_UNIX and not private:
            make = partial(protocol, loop=loop, app=app, signal=Signal(), connections=server.connections)
            tls_listeners[server] = TlsListener(each, make, tls, limiter, settings.header_timeout)
    return servers, tls_listeners


async def _heartbeat(context: ServerContext, lifeline: socket.socket, heartbeat_s: float) -> None:
    while True:
        metrics.sample(context)
        with suppress(BlockingIOError):  # the supervisor has unread heartbeats
            lifeline.send(b".")
        await asyncio.sleep(heartbeat_s)


def _reuse_freed_memory() -> None:
    """Let malloc reuse the buffers of bodies. By default, it returns each to the OS, and then has to clear new pages.

    To copy 200 KiB into a new buffer took 80 µs without this, 5 µs with it (on a virtual machine).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not every libc has it
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _REUSED_BUFFER_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 2 * _REUSED_BUFFER_BYTES)  # of free memory in each arena; `_trim_heap` returns it


async def _trim_heap(context: ServerContext) -> None:
    """Return freed heap to the OS periodically. Without this, glibc keeps the peak of the busiest moment."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    while malloc_trim is not None:
        await asyncio.sleep(_TRIM_INTERVAL_S)
        with suppress(RuntimeError):  # cannot start a thread
            await context.threads.run_io(partial(malloc_trim, 0))


async def _drain(servers: Sequence[AsyncioServer], grace: float) -> None:
    """Stop accepting, close idle connections, and give the others `grace` seconds to finish their response."""
    for server in servers:
        server.close()  # type: ignore[no-untyped-call]
    loop = asyncio.get_running_loop()
    deadline = loop.time() + grace
    while open_connections := [connection for server in servers for connection in server.connections]:
        late = loop.time() >= deadline
        for connection in open_connections:
            if late:
                connection.abort()
            elif connection.http:  # a request is being answered: the last one of this connection
                connection.http.keep_alive = False
            else:
                connection.close()
        await asyncio.sleep(_DRAIN_POLL_S)


async def _reload_when(wanted: asyncio.Event, reload: Callable[[], None], end_streams: Callable[[], None]) -> None:
    """Reload in a thread whenever `wanted` is set. Signals that arrive before a reload begins are merged into it.

    Then end the streams of events, so that their clients present a token that is still valid.
    """
    while True:
        await wanted.wait()
        wanted.clear()
        await asyncio.to_thread(reload)
        end_streams()


def _reload(context: ServerContext, listeners: Collection[TlsListener], guard: Guard | None) -> None:
    """Reload the certificates for new connections, and the tokens. If a file is invalid, keep the old content."""
    settings, failed = context.settings, False
    tls: ssl.SSLContext | None = None
    if settings.tls_cert_path is not None:
        try:
            # A new context, because a handshake fails while another thread replaces certificate and key of its context.
            tls = credentials.tls_context(settings)
        except (ConfigError, OSError) as error:
            failed = True
            _log.error("TLS reload failed, still using the old certificate: %s", error)
        else:
            for listener in listeners:
                listener.tls = tls or listener.tls
            _log.info("TLS certificate reloaded")
    if guard is not None:
        try:
            guard.load_tokens()
        except ConfigError as error:
            failed = True
            _log.error("token reload failed, still using the old tokens: %s", error)
        else:
            _log.info("tokens reloaded")
    context.metrics.own.reload_failed = failed
    if not failed:
        _note_loaded(context.metrics.own, settings, tls)


def _note_loaded(counters: WorkerCounters, settings: Settings, tls: ssl.SSLContext | None) -> None:
    """Store the time of a successful start or reload, and the end of the certificate."""
    counters.loaded_at = time.time()
    if tls is not None:
        try:
            counters.certificate_expires_at = credentials.certificate_end(settings, tls)
        except credentials.CertificateError:  # a warning of the start, or of `harmonia check-config`
            counters.certificate_expires_at = 0

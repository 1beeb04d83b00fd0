"""Server context: the settings, store, caches, threads and counters that all resources share."""

import asyncio
import logging
import math
import os
import time
from collections.abc import Callable, Container, Generator, Hashable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Protocol, TypeVar

from sanic import Request

from harmonia.cache import zstd
from harmonia.cache.disk_cache import DiskCache, open_cache
from harmonia.cache.frame_index import index_files
from harmonia.cache.layout_cache import Layouts
from harmonia.cache.nar_compressor import Compressor
from harmonia.cache.zstd_frames import Compressed, Source
from harmonia.config.settings import Settings
from harmonia.config.tokens import SCOPES, Scope
from harmonia.config.wrong_setting import WrongSettingError
from harmonia.errors import StoreUnavailableError
from harmonia.metrics.shared_counters import Metrics
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey
from harmonia.nix.store_path import StorePath
from harmonia.process.loop_reads import advance, finish
from harmonia.process.loop_turns import LoopTurns
from harmonia.process.single_flight import SingleFlight
from harmonia.process.thread_reader import Submit, run_in_thread
from harmonia.process.threads import Threads
from harmonia.push.receiver import PushReceiver
from harmonia.server.events import Events
from harmonia.server.http import access_log
from harmonia.server.http.negotiation import NotAcceptable
from harmonia.server.http.rate_limit import Rate
from harmonia.server.http.response import Body, Deferred, Encoded, Representation
from harmonia.server.http.response_cache import Content
from harmonia.server.made_once import MadeOnce
from harmonia.server.path_lookup import Paths
from harmonia.server.served_paths import ServedPaths
from harmonia.store.debug_index import DebugInfo
from harmonia.store.explain import Reason
from harmonia.store.file_reader import ReadOnly
from harmonia.store.publish_policy import PublishPolicy
from harmonia.store.store import Store
from harmonia.store.temp_roots import TempRootLease, TempRoots
from harmonia.upstream.failed_nars import FailedNars
from harmonia.upstream.loop_guard import new_pseudonym

if TYPE_CHECKING:
    from harmonia.server.http.auth import Guard

_LAYOUT_FILES_BYTES = 1 << 30  # on disk, for layouts with many files, and their listings
_MADE_MEMORY_BYTES = 8 * 1024 * 1024  # for pages of directories and short listings
_TEMP_ROOT_MIN_BYTES = 1 << 20
"""Size of a NAR from which on its path gets a temporary root while it is sent. Shorter NARs are read at once."""

_T = TypeVar("_T")


class Fallback(Protocol):
    """Handlers for resources of upstreams. Each raises NotFound if no upstream has the resource.

    The other resources depend only on this interface. Its implementation imports them, and an HTTP client.
    """

    async def get_narinfo(self, request: Request, hash_part: str) -> Representation: ...
    def narinfo_now(self, hash_part: str) -> Content | None:
        """Return the narinfo of a path, or None if only `get_narinfo` can find out. Does not block."""

    def nar_now(self, name: str) -> Content | None:
        """Return a NAR, or None if only `get_nar` can find it. Does not block."""

    async def narinfo_text(self, request: Request, hash_part: str) -> str | None:
        """Return the narinfo of a path, or None if no upstream has it."""

    async def get_listing(self, request: Request, hash_part: str) -> Representation: ...
    async def get_nar(self, request: Request, name: str) -> Representation: ...
    async def get_log(self, request: Request, name: str) -> Representation: ...
    async def get_realisation(self, request: Request, name: str) -> Representation: ...
    async def get_build_trace(self, request: Request, derivation: str, name: str) -> Representation: ...
    async def get_debuginfo(self, request: Request, name: str) -> Representation: ...
    async def explain(self, request: Request, hash_part: str) -> list[Reason]:
        """Return what each upstream answers for a path now."""

    async def add_sibling(self, url: str) -> None:
        """Ask a binary cache of the local network, too."""

    def states(self) -> list[tuple[str, bool]]:
        """Return the name of the mirror's bucket and of each upstream, and whether it is up."""

    async def close(self) -> None: ...


class Stream(Protocol):
    """Bytes that can only be read from the first to the last."""

    def read(self, start: int, stop: int | None) -> Generator[bytes]: ...


@dataclass(frozen=True, slots=True)
class _Streamed(ReadOnly):
    """A body that is compressed from its beginning to its end, by the thread that reads it."""

    source: Stream
    size: None = None

    def read(self, start: int, stop: int | None) -> Generator[bytes]:
        return zstd.stream(self.source.read(start, stop))


def _nar_cache(settings: Settings) -> DiskCache | None:
    if not (settings.enable_compression or settings.asks_upstreams):
        return None
    return open_cache(settings, "nar", "NARs", level=logging.WARNING, bare=settings.nginx_location is not None)


def _temp_roots(settings: Settings) -> TempRoots | None:
    expected = settings.daemon_socket is not None
    return TempRoots(settings.daemon, settings.virtual_nix_store, expected=expected) if settings.daemon else None


def _debug_info(settings: Settings) -> DebugInfo | None:
    if not (settings.debug_info and settings.local_store):
        return None
    return DebugInfo(Store.of(settings), settings.database, os.path.join(str(settings.cache_dir), "debug-info"))


def _push_receiver(settings: Settings) -> PushReceiver:
    try:
        return PushReceiver(settings)
    except OSError as error:
        what = (
            f"cannot create {error.filename!r} for pushes: {error.strerror}; make cache_dir and push.state_dir writable"
        )
        raise WrongSettingError(what, "push", "enable") from None


class ServerContext:
    def __init__(self, settings: Settings, keys: Sequence[SecretKey], metrics: Metrics) -> None:
        self.settings = settings
        self.keys = keys
        self.metrics = metrics
        self.store = Store.of(settings)
        self.threads = Threads(Store.of(settings), metrics)
        self.loop_turns = LoopTurns()
        policy = PublishPolicy.of(settings)
        self.paths = Paths(self.store, settings.database, keys, policy, self.threads)
        self.events = Events(settings, self.paths)
        layout_files = open_cache(settings, "layouts", "large layouts of NARs", _LAYOUT_FILES_BYTES)
        self.layouts = Layouts(files=layout_files)
        self.made = MadeOnce(_MADE_MEMORY_BYTES, layout_files)
        self.query_rate = Rate(settings.max_query_rate) if settings.max_query_rate else None
        self.bulk_rate = Rate(settings.max_bulk_rate) if settings.max_bulk_rate else None
        self._temp_roots = _temp_roots(settings)
        nar_cache = _nar_cache(settings)
        self.compressor = Compressor(settings.zstd, nar_cache, index_files(settings) if nar_cache else None)
        prefers_zstd = settings.nar_compression == "zstd" or (
            settings.nar_compression == "auto" and nar_cache is not None
        )
        self.compressor.on_compressed = self.events.compressed
        self.offers_zstd = settings.enable_compression and prefers_zstd
        """True if narinfos name compressed NARs."""
        self.debug_info = _debug_info(settings)
        self.push = _push_receiver(settings) if settings.push.enable else None
        self.served_paths = ServedPaths() if settings.mirror.write_served else None
        self.compression_saved_bytes = 0
        """NAR sizes less the bytes sent, of NARs that this worker sent whole and compressed."""
        self.small_nars = SingleFlight()
        """Small NARs that are being compressed."""
        self.failed_nars = FailedNars()
        self.scopes: Callable[[Request], Container[Scope]] = lambda _: frozenset(SCOPES)
        """Returns the scopes of a request. A server with tokens sets it."""
        self.upstreams: Fallback | None = None
        """Handlers for upstreams. Set by a worker when it starts."""
        self.guard: Guard | None = None
        """Check of tokens. Set by a worker when it starts, if requests need tokens."""
        self.identity = new_pseudonym()
        """Pseudonym of this server, shared by all workers, in Via."""

    def nginx_location(self, request: Request) -> str | None:
        """Return `nginx_location` if a trusted proxy asks to send cached files itself, otherwise None."""
        asks = request.headers.get("x-sendfile-type", "").lower() == "x-accel-redirect"
        is_trusted = asks and access_log.from_proxy(request, self.settings.trusted_proxies)
        return self.settings.nginx_location if is_trusted else None

    @property
    def trusted_keys(self) -> list[str]:
        """Public keys that clients must trust: ours, and those of upstreams whose paths we do not sign."""
        upstream_keys = (each.public_keys for each in self.settings.sources if not (each.sign and self.keys))
        own_keys, sibling_keys = (str(key.public_key) for key in self.keys), self.settings.lan.public_keys
        return list(dict.fromkeys([*own_keys, *chain.from_iterable(upstream_keys), *sibling_keys]))

    def note_served(self, path: StorePath, sent: int, *, complete: bool = True) -> None:
        """Record a response with the NAR of a path, or a part of it."""
        self.events.served(path, sent, complete=complete)
        if self.served_paths is not None and complete:
            self.served_paths.add(path)

    def client(self, request: Request) -> str:
        """Return the address of the client, behind trusted proxies, or "unix" for a Unix socket."""
        return access_log.client(request, self.settings.trusted_proxies)

    def may_browse(self, request: Request) -> bool:
        """Return True if the client may list and search the store paths."""
        return self.settings.browse and "browse" in self.scopes(request)

    async def store_size(self) -> tuple[float, float]:
        """Return the number of valid paths and the sum of their NAR sizes, counted once a minute; NaN on errors."""

        def count() -> tuple[float, float]:
            store = Store.of(self.settings)
            with closing(store.database), suppress(StoreUnavailableError):
                return store.size()
            return math.nan, math.nan

        return await self.made.value(("store size", time.monotonic() // 60), None, count, lambda _: 200)

    def submitter(self, request: Request) -> Submit:
        """Return a function that runs a function in a thread for bodies, fairly between clients."""
        return partial(self.threads.bodies.submit, self.client(request))

    async def run_in_steps(self, client: Hashable, steps: Generator[None, None, _T]) -> _T:
        """Run a generator that reads from the disk, and return its result.

        It runs on the event loop, a millisecond at a time, as long as its reads come from memory: a thread would
        compete for the interpreter at each system call, which takes longer than the reads. After a read that waited for
        the disk, a thread runs the rest.
        """
        with closing(steps):
            while self.threads.loop_io.allowed:
                if (result := self.threads.loop_io.run(partial(advance, steps))) is not None:
                    return result[0]
                await asyncio.sleep(0)  # let other tasks run
                await self.loop_turns.start(lambda: client)
            return await run_in_thread(partial(finish, steps), partial(self.threads.bodies.submit, client))

    def acquire_temp_root(self, info: PathInfo) -> TempRootLease | None:
        """Protect a path from garbage collection, and return the lease to release.

        Return None if the NAR is smaller than _TEMP_ROOT_MIN_BYTES, or if there is no Nix daemon.
        """
        is_worthwhile = info.nar_size >= _TEMP_ROOT_MIN_BYTES
        return self._temp_roots.acquire(info.path) if self._temp_roots and is_worthwhile else None

    def close(self) -> None:
        """Release all temporary roots, and let running imports fail soon. Does not block."""
        if self.push is not None:
            self.push.close()
        if self._temp_roots is not None:
            self._temp_roots.close()

    def encoded(self, source: Source) -> Encoded | None:
        """Return a body with the content coding zstd, or None if compression is off."""

        async def open_encoded(request: Request) -> Body:
            if request.version == "1.0":  # HTTP/1.0 needs a length, which is unknown
                raise NotAcceptable
            return Compressed(self.compressor.encoder, source)

        name = self.compressor.encoder.encoding.name
        return Encoded(name, Deferred(open_encoded)) if self.settings.enable_compression else None

    def streamed(self, source: Stream) -> Encoded | None:
        """Return a body with the content coding zstd like `encoded`, for a source without random access."""

        async def open_encoded(request: Request) -> Body:
            if request.version == "1.0":
                raise NotAcceptable
            return _Streamed(source)

        return Encoded(zstd.STREAM, Deferred(open_encoded)) if self.settings.enable_compression else None

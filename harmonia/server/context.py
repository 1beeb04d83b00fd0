"""Server context: the settings, store, caches, threads and counters that all resources share."""

import importlib
import logging
import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Protocol

from sanic import Request

from harmonia.cache import zstd
from harmonia.cache.disk_cache import NarCache, open_cache
from harmonia.cache.frame_index import index_files
from harmonia.cache.layout_cache import Layouts
from harmonia.cache.nar_compressor import Compressor
from harmonia.cache.zstd_frames import Compressed, Source
from harmonia.config.settings import PublishRules, Settings
from harmonia.metrics.shared_counters import Metrics
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey
from harmonia.server.http import access_log
from harmonia.server.http.negotiation import NotAcceptable
from harmonia.server.http.rate_limit import Rate
from harmonia.server.http.response import Body, Encoded, Representation, Submit
from harmonia.server.made_once import MadeOnce
from harmonia.server.path_lookup import Paths
from harmonia.server.threads import Threads
from harmonia.store.debug_index import DebugInfo
from harmonia.store.publish_policy import PublishPolicy
from harmonia.store.store import Store
from harmonia.store.temp_roots import TempRootLease, TempRoots
from harmonia.upstream.failed_nars import FailedNars
from harmonia.upstream.loop_guard import new_pseudonym

_LAYOUT_MEMORY_BYTES = 16 * 1024 * 1024  # bytes for the layouts of recently used NARs: some 400,000 files
_LAYOUT_FILES_BYTES = 1 << 30  # for those of many files, and their listings, on disk
_MADE_MEMORY_BYTES = 8 * 1024 * 1024  # bytes for pages of directories and short listings
_TEMP_ROOT_MIN_BYTES = 1 << 20  # bytes of a NAR: the path of a larger one is kept while it is sent


class Fallback(Protocol):
    """The resources of other caches. Each handler raises NotFound if no upstream has the resource.

    The resources know this interface only: its implementation needs them, and an HTTP client.
    """

    async def get_narinfo(self, request: Request, hash_part: str) -> Representation: ...
    async def get_listing(self, request: Request, hash_part: str) -> Representation: ...
    async def get_nar(self, request: Request, name: str) -> Representation: ...
    async def get_log(self, request: Request, name: str) -> Representation: ...
    async def get_realisation(self, request: Request, name: str) -> Representation: ...
    async def get_build_trace(self, request: Request, derivation: str, name: str) -> Representation: ...
    async def get_debuginfo(self, request: Request, name: str) -> Representation: ...
    def state(self) -> str:
        """Return a line for each upstream that tells whether it is up."""

    async def close(self) -> None: ...


class Stream(Protocol):
    """Bytes that are read from the first to the last."""

    def read(self, start: int, stop: int | None) -> Generator[bytes | None]: ...


@dataclass(frozen=True, slots=True)
class _Streamed:
    """A body compressed from its beginning to its end, by the thread that reads it."""

    source: Stream
    size: None = None

    def read(self, start: int, stop: int | None) -> Generator[bytes | None]:
        return zstd.stream(self.source.read(start, stop))


def _nar_cache(settings: Settings) -> NarCache | None:
    if not (settings.enable_compression or settings.upstream):
        return None
    return open_cache(settings, "nar", "NARs", level=logging.WARNING)


def _temp_roots(settings: Settings) -> TempRoots | None:
    expected = settings.daemon_socket is not None
    return TempRoots(settings.daemon, settings.virtual_nix_store, expected=expected) if settings.daemon else None


class ServerContext:
    def __init__(self, settings: Settings, keys: Sequence[SecretKey], metrics: Metrics) -> None:
        self.settings = settings
        self.keys = keys
        self.metrics = metrics
        self.store = Store.of(settings)
        self.threads = Threads(Store.of(settings), metrics)
        policy = PublishPolicy(settings.publish, Store.of(settings)) if settings.publish != PublishRules() else None
        self.paths = Paths(self.store, settings.database, keys, policy, self.threads)
        layout_files = open_cache(settings, "layouts", "large layouts of NARs", _LAYOUT_FILES_BYTES)
        self.layouts = Layouts(_LAYOUT_MEMORY_BYTES, layout_files)
        self.made = MadeOnce(_MADE_MEMORY_BYTES, layout_files)
        self.query_rate = Rate(settings.max_query_rate) if settings.max_query_rate else None
        self._temp_roots = _temp_roots(settings)
        nar_cache = _nar_cache(settings)
        self.compressor = Compressor(settings.zstd, nar_cache, index_files(settings) if nar_cache else None)
        wanted = settings.nar_compression == "zstd" or (settings.nar_compression == "auto" and nar_cache is not None)
        self.offers_zstd = settings.enable_compression and wanted
        """Whether narinfos lead to compressed NARs."""
        directory = os.path.join(str(settings.cache_dir), "debug-info")
        self.debug_info = DebugInfo(Store.of(settings), settings.database, directory) if settings.debug_info else None
        self.failed_nars = FailedNars()
        self.upstreams: Fallback | None = None
        """Other caches, while a worker serves."""
        if settings.upstream:  # half a second and 9 MiB, for those who need it, and before the workers part
            importlib.import_module("harmonia.server.resources.upstream_fallback")
        self.identity = new_pseudonym()
        """The pseudonym of this server, of all its workers, to other Harmonias."""

    @property
    def trusted_keys(self) -> list[str]:
        """What clients have to trust: our public keys, and those of upstreams whose paths we do not sign as well."""
        theirs = (upstream.public_keys for upstream in self.settings.upstream if not (upstream.sign and self.keys))
        return list(dict.fromkeys([*(str(key.public_key) for key in self.keys), *chain.from_iterable(theirs)]))

    def client(self, request: Request) -> str:
        """Return the address of the client, as far as it is known."""
        return access_log.client(request, self.settings.trusted_proxies)

    def submitter(self, request: Request) -> Submit:
        """Return what runs a function in a thread for bodies, when it is the turn of the client of the request."""
        return partial(self.threads.bodies.submit, self.client(request))

    def acquire_temp_root(self, info: PathInfo) -> TempRootLease | None:
        """Keeps a path from being collected, where that is worthwhile and the Nix daemon can be asked."""
        return (
            self._temp_roots.acquire(info.path) if self._temp_roots and info.nar_size >= _TEMP_ROOT_MIN_BYTES else None
        )

    def encoded(self, source: Source) -> Encoded | None:
        """A body as it can be sent compressed, if it can."""

        async def open_encoded(request: Request) -> Body:
            if request.version == "1.0":  # it has no end for an unknown length
                raise NotAcceptable
            return Compressed(self.compressor.encoder, source)

        return (
            Encoded(self.compressor.encoder.encoding.name, open_encoded) if self.settings.enable_compression else None
        )

    def streamed(self, source: Stream) -> Encoded | None:
        """Likewise one that cannot be read from its midst."""

        async def open_encoded(request: Request) -> Body:
            if request.version == "1.0":
                raise NotAcceptable
            return _Streamed(source)

        return Encoded(zstd.STREAM, open_encoded) if self.settings.enable_compression else None

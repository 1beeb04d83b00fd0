"""What every resource is answered from: the settings, our keys, and the store's paths, looked up and remembered."""

import asyncio
import importlib
import logging
import os
import secrets
from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from sanic import Request

from harmonia import catalogue, zstd
from harmonia.compression import Compressed, Compressor, Source
from harmonia.debug_info import DebugInfo
from harmonia.errors import StoreObjectError, StoreUnavailableError
from harmonia.metrics import Metrics
from harmonia.nar_cache import NarCache
from harmonia.nix import narinfo
from harmonia.nix.nar_layout import Layouts
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey, is_signature
from harmonia.nix.store_path import StorePath
from harmonia.release import Release
from harmonia.server.body import Body, Encoded
from harmonia.server.negotiation import NotAcceptable
from harmonia.settings import ReleaseRules, Settings
from harmonia.store import BUSY_TIMEOUT, Database, Store
from harmonia.temp_roots import Hold, TempRoots

if TYPE_CHECKING:
    from harmonia.server.upstream_answers import Answers

_REMEMBERED_PATHS = 8192  # about 2 KiB each
_LAYOUT_MEMORY = 16 * 1024 * 1024  # bytes for the layouts of recently used NARs: some 400,000 files
_FRESH = 1.0  # seconds for which what the roots of a release need is taken not to have changed
_STALE = 10.0  # seconds for which a path that was among it may go out without another look
_HELD = 1 << 20  # bytes of a NAR from which on its path is kept while it is sent: what is shorter is read at once
_READERS = 16  # threads that read store objects; one is busy only while it reads a chunk, not while that is sent

_T = TypeVar("_T")

_log = logging.getLogger("harmonia")


@dataclass(frozen=True, slots=True)
class SignedPath:
    """A valid path that may leave the house, with all the signatures that its narinfo shows."""

    info: PathInfo
    sigs: tuple[str, ...]


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
    try:
        return NarCache(os.path.join(str(settings.cache_dir), "nar"), settings.cache_bytes)
    except OSError as error:
        _log.warning("NARs are not kept: %s: %s", error.filename, error.strerror)
        return None


def _temp_roots(settings: Settings) -> TempRoots | None:
    expected = settings.daemon_socket is not None
    return TempRoots(settings.daemon, settings.virtual_nix_store, expected=expected) if settings.daemon else None


def _store(settings: Settings) -> Store:
    return Store(settings.virtual_nix_store, settings.real_store, settings.database)


class Cache:
    def __init__(self, settings: Settings, keys: Sequence[SecretKey], metrics: Metrics) -> None:
        self.settings = settings
        self.keys = keys
        self.metrics = metrics
        self.store = _store(settings)
        self.layouts = Layouts(_LAYOUT_MEMORY)
        self._temp_roots = _temp_roots(settings)
        nar_cache = _nar_cache(settings)
        self.compressor = Compressor(settings.zstd, nar_cache)
        wanted = settings.nar_compression == "zstd" or (settings.nar_compression == "auto" and nar_cache is not None)
        self.offers_zstd = settings.enable_compression and wanted
        """Whether narinfos lead to compressed NARs."""
        directory = os.path.join(str(settings.cache_dir), "debug-info")
        self.debug_info = DebugInfo(_store(settings), settings.database, directory) if settings.debug_info else None
        self.upstreams: Answers | None = None
        """Other caches, while a worker serves."""
        if settings.upstream:  # half a second and 9 MiB, for those who need it, and before the workers part
            importlib.import_module("harmonia.server.upstream_answers")
        self.identity = secrets.token_hex(8)
        """What we call ourselves to other Harmonias, all workers alike."""
        self.readers = ThreadPoolExecutor(_READERS, thread_name_prefix="read")
        self._reading: dict[Hashable, asyncio.Future[Any]] = {}
        self._database_thread = ThreadPoolExecutor(1, thread_name_prefix="database")
        # For questions that take long. No narinfo waits behind them.
        self.browsed = _store(settings)
        self._browsing_thread = ThreadPoolExecutor(1, thread_name_prefix="browse")
        # For the event loop: it only asks whether anything changed, which costs no disk access, and it never waits.
        self._watch = Database(settings.database, timeout=0)
        self.release = Release(settings.release, _store(settings)) if settings.release != ReleaseRules() else None
        self._closure = self.release.closure if self.release is not None else None
        self._closure_thread = ThreadPoolExecutor(1, thread_name_prefix="release")
        self._refreshing: Future[None] | None = None
        self._this_turn: Hashable = None
        self._known: OrderedDict[str, tuple[Hashable, SignedPath]] = OrderedDict()
        self._absent_as_of: Hashable = None
        self._absent: set[str] = set()
        """Hash parts of no path, as of that generation."""

    @property
    def trusted_keys(self) -> list[str]:
        """What clients have to trust: our public keys, and those of upstreams whose paths we do not sign as well."""
        theirs = (upstream.public_keys for upstream in self.settings.upstream if not (upstream.sign and self.keys))
        return list(dict.fromkeys([*(str(key.public_key) for key in self.keys), *chain.from_iterable(theirs)]))

    async def path(self, hash_part: str) -> SignedPath | None:
        """The valid path with that hash part, if it may leave the house: all that is told of paths is asked for here.

        StoreObjectError where its row is of no use; StoreUnavailableError.
        """
        generation = self._generation()
        if self._absent_as_of != generation:
            self._absent_as_of = generation
            self._absent.clear()
        if hash_part in self._absent:
            return None
        seen, known = self._known.get(hash_part, (None, None))
        if known is not None and seen == generation:
            self._known.move_to_end(hash_part)
            return known if self._closure is None or await self._is_needed(known.info.path) else None
        found = await self.query(partial(self._look_up, hash_part, known))
        if found is None:
            self._known.pop(hash_part, None)
            if self._absent_as_of == generation and len(self._absent) < _REMEMBERED_PATHS:
                self._absent.add(hash_part)
            return None
        # The generation was taken before the path was read: a change in between makes the next request look again.
        self._known[hash_part] = generation, found
        if len(self._known) > _REMEMBERED_PATHS:
            self._known.popitem(last=False)
        return found if self._closure is None or await self._is_needed(found.info.path) else None

    def is_current(self, path: SignedPath) -> bool:
        """Whether `path` would find the very same just now. False where only a longer look can tell."""
        known = self._known.get(path.info.path.hash_part)
        return self._closure is None and known is not None and known == (self._generation(), path)

    def _generation(self) -> Hashable:
        """That of the database, asked once for all requests that one turn of the event loop finds."""
        if self._this_turn is None:
            try:
                self._this_turn = self._watch.generation()
            except StoreUnavailableError:
                return object()  # equals no other: ask the thread, which may wait
            asyncio.get_running_loop().call_soon(self._end_turn)
        return self._this_turn

    def _end_turn(self) -> None:
        self._this_turn = None

    async def releases(self, path: StorePath) -> bool:
        """Whether a path is valid and may leave the house; without rules for that, always."""
        if self.release is None:
            return True
        try:
            found = await self.path(path.hash_part)
        except StoreObjectError:
            return False
        return found is not None and found.info.path == path

    async def releases_log(self, derivation: StorePath) -> bool:
        """Whether the log of a derivation may leave the house: with the derivation itself, or with what it made."""
        if self.release is None:
            return True
        if self.release.by_name_alone or not self.release.permits_name(derivation):
            return self.release.permits_name(derivation)
        if await self.releases(derivation):
            return True
        outputs = await self.browse(lambda store: catalogue.outputs(store, derivation))
        return any([await self.releases(output) for output in outputs])

    def released(self, store: Store) -> Callable[[StorePath], bool] | None:
        """Tells of a valid path whether it may leave the house; None where all may. For one thread, which may wait."""
        release = self.release
        if release is None:
            return None
        if self._closure is not None:
            self._closure.refresh(_FRESH)

        def is_released(path: StorePath) -> bool:
            if not release.permits_name(path) or not (self._closure is None or path in self._closure):
                return False
            try:
                info = store.path_info(path.hash_part)
            except StoreObjectError:
                return False
            return info is not None and release.permits(info)

        return is_released

    async def _is_needed(self, path: StorePath) -> bool:
        """Whether a root of the release needs it."""
        closure = self._closure
        assert closure is not None  # noqa: S101 (or nobody asks)
        if path in closure and closure.age < _STALE:
            if closure.age > _FRESH and (self._refreshing is None or self._refreshing.done()):
                self._refreshing = self._closure_thread.submit(closure.refresh, _FRESH)
            return True
        # Perhaps it was added just now, and a client remembers for an hour that it was not there.
        await self._wait(self._closure_thread, partial(closure.refresh, _FRESH))
        return path in closure

    def hold(self, info: PathInfo) -> Hold | None:
        """Keeps a path from being collected, where that is worthwhile and the Nix daemon can be asked."""
        return self._temp_roots.hold(info.path) if self._temp_roots and info.nar_size >= _HELD else None

    def encoded(self, source: Source) -> Encoded | None:
        """A body as it can be sent compressed, if it can."""

        async def open_encoded(request: Request) -> Body:
            if request.version == "1.0":  # it has no end for an unknown length
                raise NotAcceptable
            return Compressed(self.compressor, source)

        return Encoded(self.compressor.encoding.name, open_encoded) if self.settings.enable_compression else None

    def streamed(self, source: Stream) -> Encoded | None:
        """Likewise one that cannot be read from its midst."""

        async def open_encoded(request: Request) -> Body:
            if request.version == "1.0":
                raise NotAcceptable
            return _Streamed(source)

        return Encoded(zstd.STREAM, open_encoded) if self.settings.enable_compression else None

    async def read(self, ask: Callable[[], _T]) -> _T:
        """What `ask` finds on disk, in one of the threads that may wait for it."""
        return await asyncio.get_running_loop().run_in_executor(self.readers, ask)

    async def read_once(self, key: Hashable, ask: Callable[[], _T]) -> _T:
        """The same, once for all who want what the `key` stands for. It goes on when all of them have gone."""
        reading = self._reading.get(key)
        if reading is None:
            reading = self._reading[key] = asyncio.get_running_loop().run_in_executor(self.readers, ask)

            def done(reading: asyncio.Future[Any]) -> None:
                del self._reading[key]
                if not reading.cancelled():
                    reading.exception()  # nobody may be left to look at it, which asyncio would complain of

            reading.add_done_callback(done)
        found: _T = await asyncio.shield(reading)
        return found

    async def query(self, ask: Callable[[], _T]) -> _T:
        """What `ask` finds in the store, in the one thread that may wait for its database.

        StoreUnavailableError also where it waits in vain behind others.
        """
        began = perf_counter()
        try:
            return await self._wait(self._database_thread, ask)
        finally:
            self.metrics.own.database.observe(perf_counter() - began)

    async def browse(self, ask: Callable[[Store], _T]) -> _T:
        """What `ask` finds in the store, where that may take long."""
        return await self._wait(self._browsing_thread, partial(ask, self.browsed))

    async def _wait(self, thread: ThreadPoolExecutor, ask: Callable[[], _T]) -> _T:
        try:
            async with asyncio.timeout(BUSY_TIMEOUT + 1):
                return await asyncio.get_running_loop().run_in_executor(thread, ask)
        except TimeoutError:
            raise StoreUnavailableError("the database does not answer") from None

    def _look_up(self, hash_part: str, known: SignedPath | None) -> SignedPath | None:
        info = self.store.path_info(hash_part)
        if info is None or (known is not None and known.info == info):
            return known if info else None
        if self.release is not None and not self.release.permits(info):
            return None
        for sig in info.sigs:
            if not is_signature(sig):
                _log.warning("%s: the stored signature %r is malformed and left out", info.path, sig)
        return SignedPath(info, tuple(narinfo.signatures(info, self.store.store_dir, self.keys)))

"""Receiver of pushes in one worker: the spool, the imports and the GC roots, and the threads for them."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from cachetools import TTLCache

from harmonia.config import amounts, credentials
from harmonia.config.name_patterns import compile_patterns
from harmonia.config.settings import Settings
from harmonia.errors import PushRefusedError
from harmonia.nix.build_trace import Realisation
from harmonia.nix.content_coding import Decoder
from harmonia.nix.store_path import StorePath
from harmonia.ownership import hand_over
from harmonia.process.loop_reads import LoopReads
from harmonia.push.connections import HOLD_S, DaemonConnections, connect
from harmonia.push.importer import Importer, MaySign, NeedsThreadError, Signer, Upload
from harmonia.push.log_store import IncomingLog, LogStore
from harmonia.push.loop_daemon import LoopDaemon
from harmonia.push.path_locks import PathLocks
from harmonia.push.roots import PushRoots
from harmonia.push.spool import Incoming, Spool
from harmonia.store.nix_daemon import run_blocking

_SPOOL_THREADS = 4
_IMPORT_THREADS = 2  # each unpacks a NAR, in the worst case with a window of 128 MiB
_LOOP_MAX_PAUSE_S = 60.0  # of short disk accesses on the event loop, after one that waited: some of them write
_SWEEP_INTERVAL_S = 10 * 60.0
_RENEWAL_INTERVAL_S = 60 * 60.0  # between two renewals of one root
_MAX_RENEWED = 4096
_MISS_TTL_S = 3600.0  # Nix's `narinfo-cache-negative-ttl`
_MAX_MISSED = 4096

_T = TypeVar("_T")
_I = TypeVar("_I", Incoming, IncomingLog)
_log = logging.getLogger("harmonia")


@dataclass
class Counters:
    """Counts of events since the start of the process."""

    pushed_paths: int = 0
    pushed_bytes: int = 0
    push_refusals: int = 0
    push_found_after_miss: int = 0


def open_roots(settings: Settings) -> PushRoots:
    """Return the roots of pushed paths. Does no disk access."""
    directory = os.path.join(str(settings.push.state_dir), "push-roots")
    return PushRoots(os.path.abspath(directory), settings.virtual_nix_store, settings.push.keep)


class PushReceiver:
    """The implementation of `[push]` for one worker. Create it before the fork; it starts threads on first use."""

    def __init__(self, settings: Settings) -> None:
        """Create the directories. Raises OSError if they cannot be created, ConfigError if the key is invalid."""
        rules = settings.push
        max_nar_bytes = amounts.size(rules.max_nar_size)
        directory = os.path.join(str(settings.cache_dir), "push")
        self.counters = Counters()
        self.spool = Spool(directory, amounts.size(rules.spool_size), max_nar_bytes)
        self.roots = open_roots(settings)
        self.roots.create()
        self.logs = LogStore(os.path.join(str(rules.state_dir), "push-logs"), rules.keep)
        locks = PathLocks(os.path.join(directory, ".path-locks"))
        key = credentials.push_key(settings)
        self._connections = DaemonConnections(str(settings.daemon), connect)
        self._loop_connections = DaemonConnections(str(settings.daemon), LoopDaemon.open)
        self._loop_disk = LoopReads(max_pause_s=_LOOP_MAX_PAUSE_S)
        permits = compile_patterns(rules.sign_names or ("*",)).fullmatch
        self.importer = Importer(
            self._connections,
            self._loop_connections,
            self._loop_disk,
            settings.virtual_nix_store,
            locks,
            self.roots,
            self.spool,
            Signer(key, permits) if key else None,
            max_nar_bytes,
        )
        self._imports: set[asyncio.Task[bool]] = set()
        self._spooling = ThreadPoolExecutor(_SPOOL_THREADS, thread_name_prefix="spool")
        self._importing = ThreadPoolExecutor(_IMPORT_THREADS, thread_name_prefix="import")
        self._missed: MutableMapping[str, bool] = TTLCache(_MAX_MISSED, _MISS_TTL_S)
        self._renewed: MutableMapping[StorePath, bool] = TTLCache(_MAX_RENEWED, _RENEWAL_INTERVAL_S)

    async def receive(self, file_hash: str, size: int, chunks: AsyncIterator[bytes]) -> None:
        """Store a NAR file in the spool. Raises PushRefusedError without space, or if its hash is not `file_hash`."""
        await self._write(self._spooling.submit(self.spool.receive, size), chunks, lambda nar: nar.keep(file_hash))
        self._count(size)

    async def receive_small(self, file_hash: str, data: bytes | bytearray) -> Callable[[], None]:
        """Store a NAR file like `receive`, in one step: to wake a thread takes longer than to store a small file.

        Return a function that counts its bytes.
        """
        store_at_once = partial(self.spool.store_at_once, file_hash, data)
        if not (self._loop_disk.allowed and self._loop_disk.run(store_at_once)):
            await self._in_spool(partial(self.spool.store, file_hash, data))
        return partial(self._count, len(data))

    def _count(self, size: int) -> None:
        self.counters.pushed_bytes += size

    async def receive_log(self, derivation: StorePath, decoder: Decoder | None, chunks: AsyncIterator[bytes]) -> None:
        """Store a build log. Raises PushRefusedError if it is malformed or too long."""
        await self._write(self._spooling.submit(self.logs.receive, derivation, decoder), chunks, IncomingLog.keep)

    async def register(self, realisation_id: str, realisation: Realisation, may_sign: MaySign) -> None:
        """Register a realisation like `Importer.register`, which drops one without a trusted signature.

        Raises PushRefusedError if it cannot be registered.
        """
        register = partial(self.importer.register, realisation_id, realisation, may_sign)
        await asyncio.get_running_loop().run_in_executor(self._importing, register)

    def start_import(self, upload: Upload, may_sign: MaySign) -> asyncio.Task[bool]:
        """Import a path whose NAR file is in the spool. The import continues if the client disconnects.

        The result is False if the path was valid already; the error is PushRefusedError.
        """
        importing = asyncio.get_running_loop().create_task(self.import_path(upload, may_sign))
        self._imports.add(importing)
        importing.add_done_callback(self._end_import)
        return importing

    def _end_import(self, importing: asyncio.Task[bool]) -> None:
        self._imports.discard(importing)
        if not importing.cancelled():
            importing.exception()  # the client may have disconnected, so that nobody else asks for it

    async def import_path(self, upload: Upload, may_sign: MaySign) -> bool:
        """Import a path like `start_import`, as long as the caller is not cancelled."""
        try:
            is_new = await self.importer.run_on_loop(upload, may_sign)
        except NeedsThreadError:
            run = partial(self.importer.run, upload, may_sign)
            is_new = await asyncio.get_running_loop().run_in_executor(self._importing, run)
        self.counters.pushed_paths += is_new
        return is_new

    def note_answer(self, hash_part: str, *, found: bool) -> None:
        """Note if a narinfo was found. Count one that is found after this worker answered 404 for it.

        Clients that got the 404 keep it for an hour.
        """
        if not found:
            self._missed[hash_part] = True
        elif self._missed.pop(hash_part, False):
            self.counters.push_found_after_miss += 1

    def renew(self, path: StorePath) -> None:
        """Let the GC root of a path, if it has one, last for `push.keep` after this download. Does not block."""
        if path not in self._renewed:
            self._renewed[path] = True
            self._spooling.submit(self.roots.renew, path)

    async def run_maintenance(self) -> None:
        """Remove expired files and roots, and close unused connections to the daemon, at intervals until cancelled."""
        loop = asyncio.get_running_loop()
        next_sweep = loop.time()
        while True:
            try:
                await self._in_spool(self._connections.close_unused)
                self._loop_connections.close_unused()
                if loop.time() >= next_sweep:
                    next_sweep += _SWEEP_INTERVAL_S
                    await self._in_spool(self._sweep)
            except OSError as error:
                _log.error("cannot clean up after pushes: %s; trying again", error)
            await asyncio.sleep(HOLD_S / 2)

    def close(self) -> None:
        """Let running imports fail soon. Does not block."""
        self.importer.stop()

    def _sweep(self) -> None:
        self.spool.sweep()
        self.logs.expire()
        for path in self.roots.expire():
            _log.info("%s: not pushed or downloaded for push.keep; Nix may collect it", path)
        if self.roots.find_all():
            with suppress(PushRefusedError):
                run_blocking(self._register_roots())

    async def _register_roots(self) -> None:
        async with self._connections.borrowed() as daemon:
            self.roots.register(daemon)

    async def _write(self, opening: "Future[_I]", chunks: AsyncIterator[bytes], keep: Callable[[_I], None]) -> None:
        """Write chunks to a file that a thread is opening, and keep the file if all of them arrive."""
        incoming = await hand_over(opening)
        try:
            async for chunk in chunks:
                await self._in_spool(partial(incoming.write, chunk))
            await self._in_spool(partial(keep, incoming))
        finally:
            self._spooling.submit(incoming.close)

    async def _in_spool(self, job: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._spooling, job)

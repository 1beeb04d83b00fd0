"""Watcher: queues each path that becomes valid in the store for its upload.

Three sources fill the queue: the store's database, GC roots that point to new paths, and a unix socket for names.
"""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager, closing, suppress
from typing import TypeVar

from harmonia.errors import FormatError, StoreObjectError, StoreUnavailableError
from harmonia.nix.path_info import PathInfo
from harmonia.nix.store_path import StorePath
from harmonia.store import gc_roots, queries
from harmonia.store.new_paths import POLL_S, Cursor, DatabaseChanges, NewPaths, Page
from harmonia.store.store import Store
from harmonia.upload.queue_uploader import QueueUploader
from harmonia.upload.task_group import task_group
from harmonia.upload.uploader import Uploader

_RETRY_S = 1.0  # after an error of the store
_ROOTS_POLL_S = 1.0
_MAX_NAMES_BYTES = 1 << 20  # of one connection to the socket
_NAMES_S = 10.0  # for a connection to the socket

_T = TypeVar("_T")

_log = logging.getLogger("harmonia")


class Watcher:
    """Fills the queue of `uploads` and uploads it, until it is cancelled."""

    def __init__(
        self,
        store: Store,
        db_path: str,
        uploader: Uploader,
        uploads: QueueUploader,
        *,
        wanted: Callable[[PathInfo], object],
        new_paths: bool,
        roots: Sequence[str],
    ) -> None:
        """Use the store through `uploader` only. This takes no ownership.

        `wanted` chooses among the paths from the database and from the roots. With `new_paths`, each path that becomes
        valid is a candidate; each path that one of `roots` leads to always is.
        """
        self._store = store
        self._db_path = db_path
        self._uploader = uploader
        self._uploads = uploads
        self._wanted = wanted
        self._new_paths = new_paths
        self._roots = roots

    async def run(self, ready: Callable[[], object]) -> None:
        """Watch and upload. Calls `ready` when no new path can be missed any more.

        Raises ConfigError if the queue cannot be read.
        """
        async with task_group() as group:
            if self._new_paths:
                await self._begin()
                group.create_task(self._collect_new())
            if self._roots:
                group.create_task(self._collect_roots())
            group.create_task(self._uploads.run())
            ready()

    @asynccontextmanager
    async def listening(self, path: str) -> AsyncIterator[None]:
        """Accept names of store paths, separated by white space, from connections to the unix socket `path`.

        The name of a derivation stands for its outputs.

        Raises OSError if the socket cannot be created.
        """
        with suppress(FileNotFoundError):
            os.unlink(path)
        mask = os.umask(0o177)
        try:
            server = await asyncio.start_unix_server(self._receive, path, limit=_MAX_NAMES_BYTES)
        finally:
            os.umask(mask)
        async with server:
            yield

    async def _begin(self) -> None:
        """Start with the next path at the first run, and where the last run ended at later ones."""
        if await self._uploads.cursor() is None:
            newest = await self._query(NewPaths(self._store, self._db_path).newest)
            await self._uploads.add([], newest)

    async def _collect_new(self) -> None:
        new = NewPaths(self._store, self._db_path)
        cursor = await self._uploads.cursor()
        changed = asyncio.Event()
        with closing(DatabaseChanges(self._db_path)) as changes:
            descriptor = changes.fileno()

            def note() -> None:
                changes.clear()  # otherwise the event loop would call this again and again
                changed.set()

            if descriptor is not None:
                asyncio.get_running_loop().add_reader(descriptor, note)
            try:
                while True:
                    changed.clear()
                    page, chosen = await self._query(self._page, new, cursor)
                    if cursor is not None and cursor.database != page.cursor.database:
                        _log.warning("the store's database was replaced; all its paths count as new")
                    if page.cursor != cursor:
                        await self._uploads.add(chosen, page.cursor)
                        cursor = page.cursor
                    if page.complete:
                        with suppress(TimeoutError):
                            async with asyncio.timeout(POLL_S):
                                await changed.wait()
            finally:
                if descriptor is not None:
                    asyncio.get_running_loop().remove_reader(descriptor)

    def _page(self, new: NewPaths, cursor: Cursor | None) -> tuple[Page, list[StorePath]]:
        page = new.page(cursor)
        return page, self._choose(path for _, path in page.paths if not path.is_derivation)

    def _choose(self, paths: Iterable[StorePath]) -> list[StorePath]:
        chosen = []
        for path in paths:
            with suppress(StoreObjectError):  # a malformed row is of no use to clients either
                info = self._store.path_info(path.hash_part)
                if info is not None and info.path == path and self._wanted(info):
                    chosen.append(path)
        return chosen

    async def _collect_roots(self) -> None:
        known: set[StorePath] = set()
        troubles: set[str] = set()
        while True:
            found, new, reported = await self._query(self._find_roots, known)
            for trouble in sorted(reported - troubles):
                _log.warning("watch.gc_roots: %s", trouble)
            troubles = reported
            if new:
                await self._uploads.add(new)
            known = found
            await asyncio.sleep(_ROOTS_POLL_S)

    def _find_roots(self, known: Collection[StorePath]) -> tuple[set[StorePath], list[StorePath], set[str]]:
        troubles: set[str] = set()
        found = set(gc_roots.find(self._store, self._roots, troubles.add))
        return found, self._choose(sorted(found.difference(known))), troubles

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_NAMES_S):
                names = await reader.read(_MAX_NAMES_BYTES)
                while not reader.at_eof() and len(names) < _MAX_NAMES_BYTES:
                    names += await reader.read(_MAX_NAMES_BYTES)
            words = names.decode(errors="replace").split()
            await self._uploads.add(await self._query(self._named, words))
        except (OSError, TimeoutError) as error:
            _log.warning("watch.socket: a connection failed: %s", str(error) or "timeout")
        finally:
            writer.close()

    def _named(self, names: Iterable[str]) -> list[StorePath]:
        """Return the named store paths, and the outputs of derivations instead of these. Log malformed names."""
        paths: list[StorePath] = []
        for name in names:
            try:
                path = StorePath.in_dir(self._store.store_dir, name)
            except FormatError as error:
                _log.warning("watch.socket: %s; hand over full store paths", error)
                continue
            paths += queries.outputs(self._store, path) if path.is_derivation else [path]
        return paths

    async def _query(self, function: Callable[..., _T], *arguments: object) -> _T:
        """Run a function that uses the store, again and again while the store cannot be used. Log that once."""
        is_logged = False
        while True:
            try:
                return await self._uploader.query(function, *arguments)
            except StoreUnavailableError as error:
                if not is_logged:
                    _log.error("%s; trying again every %g s", error, _RETRY_S)
                is_logged = True
                await asyncio.sleep(_RETRY_S)

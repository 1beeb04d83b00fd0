"""Watcher: uploads each path that becomes valid in the store, from a durable queue.

Three sources fill the queue: the store's database, GC roots that point to new paths, and a unix socket for names. A
path leaves the queue when the target has its closure, or when it was garbage-collected. While the target does not
answer, nothing counts as a failure of a path.
"""

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, suppress
from functools import partial
from typing import TypeVar

from harmonia.errors import FormatError, StoreObjectError, StoreUnavailableError
from harmonia.nix.path_info import PathInfo
from harmonia.nix.store_path import StorePath
from harmonia.store import gc_roots, queries
from harmonia.store.new_paths import POLL_S, Cursor, DatabaseChanges, NewPaths, Page
from harmonia.store.store import Store
from harmonia.upload.queue import Item, QueueWriteError, Statistics, UploadQueue
from harmonia.upload.target import Target, TargetError, TargetUnavailableError
from harmonia.upload.task_group import task_group
from harmonia.upload.uploader import CollectedError, Outcome, ReferenceFailedError, Uploader

_BATCH_ITEMS = 64  # that share a question to the target
_MAX_BATCHES = 16  # at once, so that small paths do not wait for a large one
_RETRY_S = 1.0  # after an error of the store or of the queue's disk
_ROOTS_POLL_S = 1.0
_MAX_PROBE_S = 60.0  # between two questions if the target answers again
_MAX_IDLE_S = 60.0  # between two looks at the queue
_MAX_NAMES_BYTES = 1 << 20  # of one connection to the socket
_NAMES_S = 10.0  # for a connection to the socket

_T = TypeVar("_T")

_log = logging.getLogger("harmonia")


class Watcher:
    """Uploads to one target, until it is cancelled."""

    def __init__(
        self,
        store: Store,
        db_path: str,
        queue: UploadQueue,
        target: Target,
        uploader: Uploader,
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
        self._queue = queue
        self._target = target
        self._uploader = uploader
        self._wanted = wanted
        self._new_paths = new_paths
        self._roots = roots
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="queue")
        self._in_work: set[StorePath] = set()
        self._settled = asyncio.Event()  # the queue or the set of paths in work has changed
        self._is_down: bool | None = None  # None until the first question
        self.counts: Counter[str] = Counter()
        """Paths by their end: `uploaded`, `collected`, and failed attempts as `failed`."""

    @property
    def target_answers(self) -> bool:
        """Return True if the target answered the last question if it takes uploads."""
        return self._is_down is False

    async def statistics(self) -> Statistics:
        """Return counts of the queued paths."""
        return await self._with_queue(self._queue.statistics)

    async def run(self, ready: Callable[[], object]) -> None:
        """Watch and upload. Calls `ready` when no new path can be missed any more.

        Raises ConfigError if the queue cannot be read.
        """
        try:
            async with task_group() as group:
                if self._new_paths:
                    await self._begin()
                    group.create_task(self._collect_new())
                if self._roots:
                    group.create_task(self._collect_roots())
                group.create_task(self._upload())
                ready()
        finally:
            self._thread.shutdown()

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
        if self._queue.cursor() is None:
            newest = await self._retrying(partial(self._uploader.query, NewPaths(self._store, self._db_path).newest))
            await self.add([], newest)

    async def _collect_new(self) -> None:
        new = NewPaths(self._store, self._db_path)
        cursor = self._queue.cursor()
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
                    page, chosen = await self._retrying(partial(self._uploader.query, self._page, new, cursor))
                    if cursor is not None and cursor.database != page.cursor.database:
                        _log.warning("the store's database was replaced; all its paths count as new")
                    if page.cursor != cursor:
                        await self.add(chosen, page.cursor)
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
            found, new, reported = await self._retrying(partial(self._uploader.query, self._find_roots, known))
            for trouble in sorted(reported - troubles):
                _log.warning("watch.gc_roots: %s", trouble)
            troubles = reported
            if new:
                await self.add(new)
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
            await self.add(await self._retrying(partial(self._uploader.query, self._named, words)))
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

    async def add(self, paths: Collection[StorePath], cursor: Cursor | None = None) -> None:
        """Queue paths, valid or not. Tries until the queue's disk accepts them."""
        await self._retrying(partial(self._with_queue, self._queue.add, paths, cursor))
        if paths:
            self._settled.set()

    async def _upload(self) -> None:
        batches: set[asyncio.Task[None]] = set()
        try:
            while True:
                self._settled.clear()
                if self._is_down is not False:
                    await self._wait_for_target()
                items: list[Item] = []
                if len(batches) < _MAX_BATCHES:
                    items = await self._with_queue(self._queue.due, _BATCH_ITEMS, frozenset(self._in_work))
                if items:
                    self._in_work.update(item.path for item in items)
                    batch = asyncio.create_task(self._upload_batch(items))
                    batches.add(batch)
                    batch.add_done_callback(lambda _: self._settled.set())
                else:
                    due = await self._with_queue(self._queue.next_due)
                    idle = _MAX_IDLE_S if due is None else min(max(due - time.time(), 0.01), _MAX_IDLE_S)
                    with suppress(TimeoutError):
                        async with asyncio.timeout(idle):
                            await self._settled.wait()
                for batch in [each for each in batches if each.done()]:
                    batches.remove(batch)
                    batch.result()  # raises what is a bug
        finally:
            for batch in batches:
                batch.cancel()
            await asyncio.gather(*batches, return_exceptions=True)

    async def _upload_batch(self, items: Sequence[Item]) -> None:
        waiting = {item.path: item for item in items}
        failures: dict[StorePath, Exception] = {}
        try:
            infos, _ = await self._uploader.plan(waiting)
            planned = {info.path for info in infos}
            present = [path for path in waiting if path not in planned]
            ended: asyncio.Queue[tuple[StorePath, Outcome] | None] = asyncio.Queue()
            uploading = asyncio.create_task(self._uploader.upload(infos, lambda *end: ended.put_nowait(end)))
            uploading.add_done_callback(lambda _: ended.put_nowait(None))
            try:
                while (end := await ended.get()) is not None:
                    path, outcome = end
                    if path in waiting and isinstance(outcome, CollectedError | None):
                        await self._finish({path: outcome}, waiting)
                    elif outcome is not None:
                        failures[path] = outcome
                await uploading
            finally:
                uploading.cancel()
                await asyncio.gather(uploading, return_exceptions=True)
            # The target may have a path and lack some of its closure.
            incomplete = await self._uploader.query(self._needing, present, set(failures)) if failures else {}
            await self._finish({path: None for path in present if path not in incomplete}, waiting)
            failures |= {path: failures[reference] for path, reference in incomplete.items()}
        except StoreUnavailableError as error:
            _log.warning("%s; trying again", error)
            await asyncio.sleep(_RETRY_S)
        except (StoreObjectError, FormatError) as error:  # a malformed row in the closure of one of the items
            if len(waiting) == 1:
                failures |= dict.fromkeys(waiting, error)
            else:
                for item in waiting.values():
                    await self._upload_batch([item])
        except (TargetError, OSError) as error:
            failures |= dict.fromkeys(waiting, error)
        finally:
            try:
                await self._postpone(failures, waiting)
            finally:
                self._in_work.difference_update(item.path for item in items)

    async def _finish(self, outcomes: dict[StorePath, Outcome], waiting: dict[StorePath, Item]) -> None:
        """Remove paths from the queue that the target has, or that are not valid any more."""
        if not outcomes:
            return
        valid = await self._uploader.query(self._valid, outcomes)
        for path, outcome in outcomes.items():
            del waiting[path]
            if path not in valid or isinstance(outcome, CollectedError):
                self.counts["collected"] += 1
                _log.info("%s was garbage-collected before its upload; dropped", path)
            else:
                self.counts["uploaded"] += 1
        await self._with_queue(self._queue.remove, list(outcomes))

    def _needing(self, paths: Iterable[StorePath], failed: set[StorePath]) -> dict[StorePath, StorePath]:
        """Return the paths with a failed path in their closure, and that path."""
        found = {path: failed.intersection(queries.closure_paths(self._store, [path])) for path in paths}
        return {path: min(references) for path, references in found.items() if references}

    def _valid(self, paths: Iterable[StorePath]) -> set[StorePath]:
        infos = (self._store.path_info(path.hash_part) for path in paths)
        return {info.path for info in infos if info is not None}

    async def _postpone(self, failures: dict[StorePath, Exception], waiting: dict[StorePath, Item]) -> None:
        """Delay the paths of a batch that failed, unless the target takes no uploads at all."""
        if not failures:
            return
        if any(isinstance(each, TargetError) for each in failures.values()) and not await self._probe():
            return
        for path, item in waiting.items():
            if (error := failures.get(path)) is None:
                continue
            self.counts["failed"] += 1
            least = error.retry_after if isinstance(error, TargetUnavailableError) else 0
            delay = await self._with_queue(self._queue.postpone, item, str(error), least)
            level = logging.DEBUG if isinstance(error, ReferenceFailedError) else logging.WARNING
            _log.log(level, "cannot upload %s: %s; trying again in %.0f s", path, error, delay)

    async def _probe(self) -> bool:
        """Return True if the target answers. Log it when that changes."""
        try:
            await self._target.check()
        except TargetError as error:
            if not self._is_down:
                _log.error("the target does not take uploads: %s; paths wait in the queue", error)
            self._is_down = True
        else:
            if self._is_down:
                _log.info("%s: the target takes uploads again", self._target.name)
            self._is_down = False
        return not self._is_down

    async def _wait_for_target(self) -> None:
        delay = _RETRY_S
        while not await self._probe():
            await asyncio.sleep(delay)
            delay = min(2 * delay, _MAX_PROBE_S)

    async def _with_queue(self, function: Callable[..., _T], *arguments: object) -> _T:
        """Run a method of the queue in its thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(function, *arguments))

    async def _retrying(self, function: Callable[[], Awaitable[_T]]) -> _T:
        """Await the result of a function again and again while the store or the queue cannot be used. Log that once."""
        is_logged = False
        while True:
            try:
                return await function()
            except (StoreUnavailableError, QueueWriteError) as error:
                if not is_logged and isinstance(error, StoreUnavailableError):
                    _log.error("%s; trying again every %g s", error, _RETRY_S)
                is_logged = True
                await asyncio.sleep(_RETRY_S)

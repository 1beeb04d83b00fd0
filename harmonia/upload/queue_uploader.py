"""Uploads of the paths in a durable queue.

A path leaves the queue when the target has its closure, or when it was garbage-collected. While the target does not
answer, nothing counts as a failure of a path.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TypeVar

from harmonia.errors import FormatError, StoreObjectError, StoreUnavailableError
from harmonia.nix.path_info import PathInfo
from harmonia.nix.store_path import StorePath
from harmonia.store import queries
from harmonia.store.new_paths import Cursor
from harmonia.store.store import Store
from harmonia.upload.queue import Item, QueueWriteError, Statistics, UploadQueue
from harmonia.upload.target import Target, TargetError, TargetUnavailableError
from harmonia.upload.uploader import CollectedError, Outcome, ReferenceFailedError, Uploader

_BATCH_ITEMS = 64  # that share a question to the target
_MAX_BATCHES = 16  # at once, so that small paths do not wait for a large one
_RETRY_S = 1.0  # after an error of the store or of the queue's disk
_MAX_PROBE_S = 60.0  # between two questions if the target answers again
_MAX_IDLE_S = 60.0  # between two looks at the queue

_T = TypeVar("_T")

_log = logging.getLogger("harmonia")


class QueueUploader:
    """Uploads what is in a queue to one target, until it is cancelled."""

    def __init__(self, store: Store, queue: UploadQueue, target: Target, uploader: Uploader) -> None:
        """Use the store through `uploader` only. The caller closes all of these, after this."""
        self._store = store
        self._queue = queue
        self._target = target
        self._uploader = uploader
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="queue")
        self._in_work: set[StorePath] = set()
        self._changed = asyncio.Event()  # the queue or the set of paths in work has changed
        self.target_answers = False
        """True if the target answered the last question if it takes uploads."""
        self._is_outage_logged = False
        self.counts: Counter[str] = Counter()
        """Paths by their end: `uploaded`, `collected`, and failed attempts as `failed`."""

    def close(self) -> None:
        self._thread.shutdown()

    async def statistics(self) -> Statistics:
        """Return counts of the queued paths."""
        return await self._with_queue(self._queue.statistics)

    async def cursor(self) -> Cursor | None:
        """Return the cursor of the last `add` that had one, or None. Raises ConfigError if it cannot be read."""
        return await self._with_queue(self._queue.cursor)

    async def add(self, paths: Collection[StorePath], cursor: Cursor | None = None) -> None:
        """Queue paths, valid or not. Tries until the queue's disk accepts them."""
        while True:
            try:
                await self._with_queue(self._queue.add, paths, cursor)
                break
            except QueueWriteError:  # the queue has logged it
                await asyncio.sleep(_RETRY_S)
        if paths:
            self._changed.set()

    async def run(self) -> None:
        """Upload paths until cancelled. Raises ConfigError if the queue cannot be read."""
        batches: set[asyncio.Task[None]] = set()
        try:
            while True:
                self._changed.clear()
                if not self.target_answers:
                    await self._wait_for_target()
                items: list[Item] = []
                if len(batches) < _MAX_BATCHES:
                    items = await self._with_queue(self._queue.due, _BATCH_ITEMS, frozenset(self._in_work))
                if items:
                    self._in_work.update(item.path for item in items)
                    batch = asyncio.create_task(self._upload_batch(items))
                    batches.add(batch)
                    batch.add_done_callback(lambda _: self._changed.set())
                else:
                    due = await self._with_queue(self._queue.next_due)
                    idle = _MAX_IDLE_S if due is None else min(max(due - time.time(), 0.01), _MAX_IDLE_S)
                    with suppress(TimeoutError):
                        async with asyncio.timeout(idle):
                            await self._changed.wait()
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
            await self._upload_paths(infos, waiting, failures)
            # The target may have a path and lack some of its closure.
            incomplete = await self._uploader.query(self._find_incomplete, present, set(failures)) if failures else {}
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

    async def _upload_paths(
        self, infos: Iterable[PathInfo], waiting: dict[StorePath, Item], failures: dict[StorePath, Exception]
    ) -> None:
        """Upload paths, and finish each of `waiting` as soon as the target has it. Add the errors to `failures`."""
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

    async def _finish(self, outcomes: dict[StorePath, Outcome], waiting: dict[StorePath, Item]) -> None:
        """Remove paths from the queue that the target has, or that are not valid any more."""
        if not outcomes:
            return
        valid = await self._uploader.query(self._find_valid, outcomes)
        for path, outcome in outcomes.items():
            del waiting[path]
            if path not in valid or isinstance(outcome, CollectedError):
                self.counts["collected"] += 1
                _log.info("%s was garbage-collected before its upload; dropped", path)
            else:
                self.counts["uploaded"] += 1
        await self._with_queue(self._queue.remove, list(outcomes))

    def _find_incomplete(self, paths: Iterable[StorePath], failed: set[StorePath]) -> dict[StorePath, StorePath]:
        """Return the paths with a failed path in their closure, and that path."""
        found = {path: failed.intersection(queries.closure_paths(self._store, [path])) for path in paths}
        return {path: min(references) for path, references in found.items() if references}

    def _find_valid(self, paths: Iterable[StorePath]) -> set[StorePath]:
        """Return the paths that are valid."""
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
            if not self._is_outage_logged:
                _log.error("the target does not take uploads: %s; paths wait in the queue", error)
            self._is_outage_logged = True
            self.target_answers = False
        else:
            if self._is_outage_logged:
                _log.info("%s: the target takes uploads again", self._target.name)
            self._is_outage_logged = False
            self.target_answers = True
        return self.target_answers

    async def _wait_for_target(self) -> None:
        delay = _RETRY_S
        while not await self._probe():
            await asyncio.sleep(delay)
            delay = min(2 * delay, _MAX_PROBE_S)

    async def _with_queue(self, function: Callable[..., _T], *arguments: object) -> _T:
        """Run a method of the queue in its thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(function, *arguments))

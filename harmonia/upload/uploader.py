"""Upload of closures to a target, references first.

The narinfo of a path is written once the narinfos of all its references are there, so whatever interrupts an upload,
clients never see a path whose closure is incomplete. NARs are written in any order, a few at a time.
"""

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from graphlib import TopologicalSorter
from typing import TypeVar

from cachetools import TTLCache

from harmonia.errors import HarmoniaError, StoreObjectError
from harmonia.nix import narinfo
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey
from harmonia.nix.store_path import StorePath
from harmonia.store import queries
from harmonia.store.store import Store
from harmonia.upload.nar_files import NarFiles
from harmonia.upload.target import Target, TargetChangedError

_BATCH_PATHS = 1000  # paths that are looked up at once
_KNOWN_PATHS = 50_000  # that the target has
_KNOWN_S = 600.0  # for which that is believed: the target may garbage-collect
_PATHS_PER_JOB = 4  # paths in work for each job: those beyond one wait for their references

_T = TypeVar("_T")


class CollectedError(HarmoniaError):
    """A path was garbage-collected before it was uploaded."""


class ReferenceFailedError(HarmoniaError):
    """A path was not uploaded, because one of its references was not."""


Outcome = Exception | None
"""Why a path was not uploaded, or None if the target has it now."""
Excluded = Callable[[PathInfo], object]
"""A function that returns true for a path that clients get elsewhere, and that is not uploaded."""


class Uploader:
    """Uploads to one target. `upload` may run several times at once; no path is then uploaded twice."""

    def __init__(
        self,
        store: Store,
        target: Target,
        nars: NarFiles,
        *,
        jobs: int,
        keys: Sequence[SecretKey] = (),
        excluded: Excluded = lambda _: False,
    ) -> None:
        """Upload at most `jobs` NARs at a time. `keys` add signatures. No other code may use `store`."""
        self._store = store
        self._target = target
        self._nars = nars
        self._keys = keys
        self._excluded = excluded
        self._database = ThreadPoolExecutor(1, thread_name_prefix="database")
        self._known: TTLCache[StorePath, None] = TTLCache(_KNOWN_PATHS, _KNOWN_S)
        self._running: dict[StorePath, asyncio.Task[None]] = {}
        self._jobs = asyncio.Semaphore(jobs)
        # A task waits only for tasks that began before it, because references come first. So some task can always run.
        self._tasks = asyncio.Semaphore(jobs * _PATHS_PER_JOB)
        self.uploaded_nars = 0
        self.uploaded_bytes = 0

    def close(self) -> None:
        self._database.shutdown()
        self._store.database.close()

    async def query(self, function: Callable[..., _T], *arguments: object) -> _T:
        """Run a function that uses the store, in the one thread that may."""
        return await asyncio.get_running_loop().run_in_executor(self._database, partial(function, *arguments))

    async def plan(self, paths: Iterable[StorePath]) -> tuple[list[PathInfo], int]:
        """Return the paths of the closure that the target lacks, references first, and the number of other paths.

        Those of `paths` that the target has are protected from its garbage collection. Leaves out paths that are not
        valid, and those that are excluded. Raises TargetError, StoreUnavailableError, or StoreObjectError if a path of
        the closure has a malformed row in the database.
        """
        chosen = {*paths}
        while True:
            closure = await self.query(queries.closure_paths, self._store, [*chosen])
            lacking = await self._lacking(closure)
            there = chosen.intersection(closure).difference(lacking)
            if await self._target.keep(there) == there:
                return await asyncio.to_thread(_references_first, lacking), len(closure) - len(lacking)
            self._known.clear()

    async def _lacking(self, closure: Iterable[StorePath]) -> dict[StorePath, PathInfo]:
        """Return the paths that the target lacks."""
        unknown = [path for path in closure if path not in self._known]
        lacking: dict[StorePath, PathInfo] = {}
        for first in range(0, len(unknown), _BATCH_PATHS):
            infos = await self.query(self._lookup, unknown[first : first + _BATCH_PATHS])
            missing = await self._target.missing(infos)
            lacking |= {path: infos[path] for path in missing}
            self._known.update(dict.fromkeys(infos.keys() - missing))
        return lacking

    async def upload(
        self,
        infos: Iterable[PathInfo],
        finished: Callable[[StorePath, Outcome], None],
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Upload paths, references first, and call `finished` for each.

        Calls `progress` with the number of NAR bytes done since the last call. If this is cancelled, so are its tasks.
        """
        own: dict[StorePath, asyncio.Task[None]] = {}
        try:
            for info in infos:
                path = info.path
                if path in self._known:  # another call has uploaded it meanwhile
                    finished(path, None)
                    continue
                if path in self._running:  # by another call
                    task = asyncio.create_task(_shared(self._running[path]))
                else:
                    await self._tasks.acquire()
                    references = [own[each] for each in info.references if each in own and each != path]
                    task = asyncio.create_task(self._put(info, references, progress))
                    self._running[path] = task
                    task.add_done_callback(partial(self._ended, path))
                own[path] = task
                task.add_done_callback(partial(_report, finished, path))
            if own:
                await asyncio.wait(own.values())
        except BaseException:
            for task in own.values():
                task.cancel()
            await asyncio.gather(*own.values(), return_exceptions=True)
            raise

    def _lookup(self, paths: Iterable[StorePath]) -> dict[StorePath, PathInfo]:
        infos = (self._store.path_info(path.hash_part) for path in paths)
        return {info.path: info for info in infos if info and not self._excluded(info)}

    def _ended(self, path: StorePath, task: "asyncio.Task[None]") -> None:
        self._tasks.release()
        del self._running[path]
        if task.cancelled():
            return
        if isinstance(task.exception(), TargetChangedError):
            self._known.clear()
        elif task.exception() is None:
            self._known[path] = None

    async def _put(
        self, info: PathInfo, references: Collection["asyncio.Task[None]"], progress: Callable[[int], None]
    ) -> None:
        async with self._jobs:
            try:
                nar = await self._nars.open_file(info)
            except (OSError, StoreObjectError) as error:
                if await self.query(self._store.path_info, info.path.hash_part) is None:
                    raise CollectedError(f"{info.path} was garbage-collected before its upload") from None
                raise error from None
            with closing(nar):
                if await self._target.put_nar(nar.file.url, nar):
                    self.uploaded_nars += 1
                    self.uploaded_bytes += nar.size
        progress(info.nar_size)
        if references:
            await asyncio.wait(references)
        if any(task.cancelled() or task.exception() for task in references):
            raise ReferenceFailedError(f"{info.path}: a reference was not uploaded")
        store_dir = self._store.store_dir
        sigs = narinfo.signatures(info, store_dir, self._keys)
        await self._target.put_narinfo(info.path, narinfo.render(info, store_dir, nar.file, sigs))


async def _shared(task: "asyncio.Task[None]") -> None:
    await asyncio.shield(task)


def _report(finished: Callable[[StorePath, Outcome], None], path: StorePath, task: "asyncio.Task[None]") -> None:
    if not task.cancelled():
        error = task.exception()
        finished(path, error if error is None or isinstance(error, Exception) else RuntimeError(str(error)))


def _references_first(infos: dict[StorePath, PathInfo]) -> list[PathInfo]:
    graph = {path: {each for each in info.references if each in infos and each != path} for path, info in infos.items()}
    return [infos[path] for path in TopologicalSorter(graph).static_order()]

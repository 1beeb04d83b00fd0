"""Cache of NAR layouts: single flight, LRU in memory, and files for large ones.

A layout is found once for all who ask, by a thread of its own few. It goes on when all of them have gone.
"""

import threading
from collections.abc import Callable, Hashable, MutableMapping
from contextlib import suppress
from typing import ParamSpec

from cachetools import LRUCache

from harmonia.cache.disk_cache import NarCache
from harmonia.cache.fair_executor import FairExecutor
from harmonia.cache.growing_file import CachedFile, Filler
from harmonia.errors import CacheFileError
from harmonia.store import tree_reader
from harmonia.store.nar_layout import Layout

_WALKER_THREADS = 4  # threads: each may hold the sorted names of one huge directory
_WALKER_THREADS_PER_CLIENT = 2  # for one client
_FILE_BYTES = 256 * 1024  # of memory that an open file counts as, so that few are open

_P = ParamSpec("_P")


class _File:
    """A file of the cache that takes the blocks of a layout."""

    def __init__(self, reader: CachedFile, filler: Filler | None) -> None:
        self._reader = reader
        self._filler = filler

    def append(self, data: bytes) -> None:
        assert self._filler is not None  # noqa: S101 (only who fills it appends)
        self._filler.append(data)

    def read(self, start: int, stop: int) -> bytes:
        part = self._reader.slice(start, stop)
        return part.read(stop - start)

    def commit(self) -> None:
        if self._filler is not None:
            self._filler.commit()

    def abandon(self) -> None:
        """Keep it for those who read it alone, unless it was committed."""
        if self._filler is not None:
            self._filler.abandon()
            self._filler = None


class Layouts:
    """The layouts of recently used NARs, in at most `limit` bytes of memory. For any thread."""

    def __init__(self, limit: int, files: NarCache | None = None) -> None:
        self.files = files
        self._known: MutableMapping[str, Layout] = LRUCache(limit, getsizeof=_cost)
        self._growing: dict[str, Layout] = {}
        self._lock = threading.Lock()
        self._walkers = FairExecutor(_WALKER_THREADS, _WALKER_THREADS_PER_CLIENT, "walk")

    def open_layout(self, key: str, root: bytes, client: Hashable = None) -> Layout:
        """Return the layout of what is at `root`, which may still grow. Never waits."""
        with self._lock:
            layout = self._growing.get(key) or self._known.get(key)
            if layout is not None:
                return layout
            layout = self._growing[key] = Layout(root)
        try:
            self._walkers.submit(client, self._find, key, layout, root)
        except RuntimeError:  # no thread can be started
            with self._lock:
                self._growing.pop(key, None)
            raise
        return layout

    def forget(self, key: str) -> None:
        """Drop a layout that is not true any longer. Those who read it go on with it."""
        with self._lock:
            self._growing.pop(key, None)
            self._known.pop(key, None)
        if self.files is not None:
            self.files.remove(key)

    def _find(self, key: str, layout: Layout, root: bytes) -> None:
        try:
            if not self._load(key, layout):
                self._walk(key, layout, root)
        except BaseException as error:  # noqa: BLE001 (it is for those who wait)
            layout.fail(error.with_traceback(None))
        with self._lock:
            if self._growing.get(key) is layout:  # else it was forgotten meanwhile
                del self._growing[key]
                if layout.error is None:
                    with suppress(ValueError):  # it is larger than the whole cache
                        self._known[key] = layout

    def _load(self, key: str, layout: Layout) -> bool:
        """Return whether the layout was kept in a file, whole and undamaged."""
        if self.files is None or (file := self.files.use_file(key)) is None:
            return False
        try:
            layout.load(_File(file, None), file.size)
        except (CacheFileError, OSError):
            self.files.discard(self.files.path(key), file)
            return False
        return True

    def _walk(self, key: str, layout: Layout, root: bytes) -> None:
        file: _File | None = None
        is_writable = True
        try:
            for _ in layout.record(tree_reader.walk(root)):
                if is_writable and layout.is_large:
                    file = file or self._new_file(key)
                    is_writable = file is not None and _done(layout.spill, file)
            if file is not None and is_writable and _done(layout.seal, file):
                _done(file.commit)
        finally:
            if file is not None:
                file.abandon()  # unless it was committed

    def _new_file(self, key: str) -> _File | None:
        """Return a file to fill; None if the disk does not let us, or if another process fills it."""
        opened = self.files.open_file(key) if self.files is not None else None
        return _File(*opened) if opened is not None and opened[1] is not None else None


def _done(write: Callable[_P, None], *arguments: _P.args, **named: _P.kwargs) -> bool:
    """Return whether the disk took it. If not, blocks stay in memory; the cache has logged why."""
    try:
        write(*arguments, **named)
    except OSError:
        return False
    return True


def _cost(layout: Layout) -> int:
    return layout.memory + (_FILE_BYTES if layout.is_in_file else 0)

"""Cache of NAR layouts: single flight, LRU in memory, and files for large ones.

One walk by a thread of this module's own pool makes a layout for all requests. The walk continues if all clients
disconnect.
"""

import threading
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import ParamSpec

from cachetools import LRUCache

from harmonia.cache.disk_cache import DiskCache
from harmonia.cache.growing_file import CachedFile, Filler
from harmonia.errors import CacheFileError
from harmonia.ownership import closed_on_error
from harmonia.process.fair_executor import FairExecutor
from harmonia.store import tree_reader
from harmonia.store.nar_layout import Layout

_WALKER_THREADS = 4  # each may hold the sorted names of one huge directory in memory
_WALKER_THREADS_PER_CLIENT = 2
_MEMORY_BYTES = 16 * 1024 * 1024  # some 400,000 files
_FILE_BYTES = 256 * 1024  # memory that an open file counts as, to limit the number of open files

_P = ParamSpec("_P")


class _File:
    """A file of the cache for the blocks of a layout."""

    def __init__(self, reader: CachedFile, filler: Filler | None) -> None:
        self._reader = reader
        self._filler = filler

    def append(self, data: bytes) -> None:
        assert self._filler is not None  # noqa: S101 (only the writer appends)
        self._filler.append(data)

    def read(self, start: int, stop: int) -> bytes:
        part = self._reader.slice(start, stop)
        return part.read(stop - start)

    def commit(self) -> None:
        if self._filler is not None:
            self._filler.commit()

    def abandon(self) -> None:
        """Remove the file from the cache, unless it was committed. Readers can continue."""
        if self._filler is not None:
            self._filler.abandon()
            self._filler = None

    def close(self) -> None:
        self._reader.close()


class _RecentLayouts(LRUCache[str, Layout]):  # type: ignore[misc,unused-ignore]  # cachetools has types from 8 on
    """The cache's own layouts. Each is closed when it is evicted."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit, getsizeof=_cost)

    def popitem(self) -> tuple[str, Layout]:
        key, layout = super().popitem()
        layout.close()
        return key, layout


class Layouts:
    """The layouts of recently used NARs, in at most `limit` bytes of memory. Thread-safe."""

    def __init__(self, limit: int = _MEMORY_BYTES, files: DiskCache | None = None) -> None:
        self.files = files
        self._recent = _RecentLayouts(limit)
        self._growing: dict[str, Layout] = {}
        self._lock = threading.Lock()
        self._walkers = FairExecutor(_WALKER_THREADS, _WALKER_THREADS_PER_CLIENT, "walk")

    def open_layout(self, key: str, root: bytes, client: Hashable = None) -> Layout:
        """Return the layout of the tree at `root`, which may still grow. The caller closes it. Does not block.

        Raises RuntimeError if no thread can be started.
        """
        with self._lock:
            layout = self._growing.get(key) or self._recent.get(key)
            if layout is not None:
                return layout.share()
            layout = self._growing[key] = Layout(root)
            layout.share()  # for the thread that makes it
        try:
            self._walkers.submit(client, self._make_layout, key, layout, root)
        except RuntimeError:  # no thread can be started
            with self._lock:
                self._growing.pop(key, None)
            raise
        return layout

    def forget(self, key: str) -> None:
        """Drop a layout that is no longer valid. Its readers can continue."""
        with self._lock:
            self._growing.pop(key, None)
            layout = self._recent.pop(key, None)
        if layout is not None:
            layout.close()
        if self.files is not None:
            self.files.remove(key)

    def _make_layout(self, key: str, layout: Layout, root: bytes) -> None:
        try:
            if not self._load(key, layout):
                self._walk(key, layout, root)
        except BaseException as error:  # noqa: BLE001 (the layout's readers raise it)
            layout.fail(error.with_traceback(None))
        with self._lock:
            if self._growing.get(key) is layout:  # false if `forget` was called meanwhile
                del self._growing[key]
                if layout.error is None:
                    with suppress(ValueError):  # larger than the limit of the cache
                        self._recent[key] = layout
                        return
        layout.close()

    def _load(self, key: str, layout: Layout) -> bool:
        """Load the layout from its file. Return False if there is none, or if it is damaged."""
        if self.files is None or (file := self.files.use_file(key)) is None:
            return False
        with closed_on_error(file):
            try:
                layout.load(_File(file, None), file.size)
            except (CacheFileError, OSError):
                self.files.discard(file)
                file.close()
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
        """Return a file to fill, or None if the disk is not writable, or if another process fills the file."""
        opened = self.files.open_file(key) if self.files is not None else None
        if opened is None:
            return None
        reader, filler = opened
        if filler is None:
            reader.close()
            return None
        return _File(reader, filler)


def _done(write: Callable[_P, None], *arguments: _P.args, **named: _P.kwargs) -> bool:
    """Call `write`, and return whether it succeeded. If not, blocks stay in memory; the cache has logged the error."""
    try:
        write(*arguments, **named)
    except OSError:
        return False
    return True


def _cost(layout: Layout) -> int:
    return layout.memory + (_FILE_BYTES if layout.is_in_file else 0)

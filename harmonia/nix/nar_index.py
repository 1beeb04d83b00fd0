"""The layout of an archive: what lies where in it, remembered in few bytes, so that a part is found without a walk."""

import stat
import threading
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from itertools import chain

from harmonia.nix.nar import Entry, Frame, Segment, frame, segments, walk, window

# A mode in five bits: its file type, which are its bits from the twelfth on, and above that whether it is executable.
_TYPE_SHIFT = 12
_TYPE = 0b1111
_EXECUTABLE = 0b10000


class Layout:
    """The entries of an archive in columns: 25 bytes for each, and its name, and what a symlink points to.

    `record` fills it, and it is of use when that has come to its end. `size` is then the archive's length in bytes.
    """

    def __init__(self, root: bytes) -> None:
        self._root = root
        self._offsets = array("Q")  # where a file's contents begin; for other entries, where they would
        self._sizes = array("Q")  # of a file's contents, of a symlink's target
        self._parents = array("I")
        self._kinds = bytearray()
        self._texts = b""  # names, each followed by what a symlink points to
        self._ends = array("I")  # where in the texts an entry's end
        self.size = 0

    @classmethod
    def of(cls, root: bytes) -> "Layout":
        """The layout of the archive of what is at `root`."""
        layout = cls(root)
        for _ in layout.record(frame(walk(root))):
            pass
        return layout

    def __len__(self) -> int:
        return len(self._kinds)

    @property
    def memory(self) -> int:
        """How many bytes the columns take."""
        columns = (self._offsets, self._sizes, self._parents, self._ends)
        return sum(column.itemsize * len(column) for column in columns) + len(self._kinds) + len(self._texts)

    def record(self, frames: Iterable[Frame]) -> Iterator[Frame]:
        """Passes on the frames of a whole archive, and remembers them."""
        texts, kinds = bytearray(), self._kinds
        position = 0
        above = [0]  # the directories that the entry is in; the root is in itself
        for words, entry in frames:
            position += len(words)
            if entry is None:
                self._texts = bytes(texts)
                self.size = position
            else:
                depth, path, mode, size, target = entry
                del above[depth + 1 :]
                self._parents.append(above[-1])
                if stat.S_ISDIR(mode):
                    above.append(len(kinds))
                self._offsets.append(position)
                self._sizes.append(size or len(target))
                if depth:
                    texts += path[path.rindex(b"/") + 1 :]
                texts += target
                self._ends.append(len(texts))
                kinds.append(mode >> _TYPE_SHIFT | (_EXECUTABLE if mode & stat.S_IXUSR else 0))
                position += size
            yield words, entry

    def entries(self, first: int = 0) -> Iterator[Entry]:
        """The entries in the archive's order, from the number `first` on."""
        directory, depth, prefix = -1, 0, self._root
        start = max(self._ends[first - 1 : first], default=0)
        columns = (memoryview(column)[first:] for column in (self._parents, self._sizes, self._kinds, self._ends))
        for number, (parent, size, kind, end) in enumerate(zip(*columns, strict=True), first):
            if number and parent != directory:
                directory = parent
                depth, prefix = self._within(parent)
            mode = (kind & _TYPE) << _TYPE_SHIFT | (stat.S_IXUSR if kind & _EXECUTABLE else 0)
            if stat.S_ISLNK(mode):
                split = end - size
                yield Entry(depth, prefix + self._texts[start:split], mode, 0, self._texts[split:end])
            else:
                yield Entry(depth, prefix + self._texts[start:end], mode, size, b"")
            start = end

    def located(self) -> Iterator[tuple[int, Entry]]:
        """The entries, each with the offset of its contents in the archive."""
        return zip(self._offsets, self.entries(), strict=True)

    def window(self, start: int, stop: int) -> Iterator[Segment]:
        """The bytes from `start` to `stop` of the archive. Where they begin is found by a binary search."""
        first = max(bisect_right(self._offsets, start) - 1, 0)
        frames = frame(self.entries(first))
        position = 0
        if first:
            _, entry = next(frames)  # its words are those of an archive that begins with it
            frames = chain([(b"", entry)], frames)
            position = self._offsets[first]
        return window(segments(frames), start - position, stop - position)

    def _within(self, directory: int) -> tuple[int, bytes]:
        """The depth of what is in a directory, and what its paths begin with."""
        names = []
        while directory:
            names.append(self._texts[self._ends[directory - 1] : self._ends[directory]])
            directory = self._parents[directory]
        return len(names) + 1, b"/".join((self._root, *reversed(names), b""))


class Layouts:
    """The layouts of recently used archives, in at most `limit` bytes. For any thread."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._layouts: OrderedDict[Hashable, Layout] = OrderedDict()
        self._lock = threading.Lock()
        self._building: dict[Hashable, threading.Lock] = {}

    def get(self, key: Hashable) -> Layout | None:
        with self._lock:
            if key in self._layouts:
                self._layouts.move_to_end(key)
            return self._layouts.get(key)

    def add(self, key: Hashable, layout: Layout) -> None:
        """Remember a layout, unless it is there, or larger than all may be together."""
        with self._lock:
            if key in self._layouts or layout.memory > self._limit:
                return
            self._layouts[key] = layout
            self._used += layout.memory
            while self._used > self._limit:
                self._used -= self._layouts.popitem(last=False)[1].memory

    def forget(self, key: Hashable) -> None:
        with self._lock:
            if layout := self._layouts.pop(key, None):
                self._used -= layout.memory

    def find(self, key: Hashable, root: bytes) -> Layout:
        """The layout of what is at `root`, walked if it is not remembered: once, however many threads ask."""
        with self._lock:
            building = self._building.setdefault(key, threading.Lock())
        try:
            with building:
                layout = self.get(key)
                if layout is None:
                    layout = Layout.of(root)
                    self.add(key, layout)
                return layout
        finally:
            with self._lock:
                self._building.pop(key, None)

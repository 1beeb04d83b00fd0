"""The layout of an archive: what lies where in it, remembered in few bytes, so that a part is found without a walk."""

import stat
import threading
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from itertools import chain

from harmonia.nix.nar import Entry, Frame, Segment, frame, segments, walk, window

_KINDS = (stat.S_IFREG, stat.S_IFREG | stat.S_IXUSR, stat.S_IFLNK, stat.S_IFDIR)
_SYMLINK = _KINDS.index(stat.S_IFLNK)


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
        self._texts = bytearray()  # names, each followed by what a symlink points to
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
        position = 0
        above: list[int] = []  # the directories that the entry is in
        for words, entry in frames:
            position += len(words)
            if entry is None:
                self.size = position
            else:
                depth, path, mode, size, target = entry
                del above[depth:]
                self._parents.append(above[-1] if above else 0)
                above.append(len(self))
                self._offsets.append(position)
                self._sizes.append(size or len(target))
                if depth:
                    self._texts += path[path.rindex(b"/") + 1 :]
                self._texts += target
                self._ends.append(len(self._texts))
                kind = stat.S_IFMT(mode)
                self._kinds.append(_KINDS.index(kind | mode & stat.S_IXUSR if kind == stat.S_IFREG else kind))
                position += size
            yield words, entry

    def entries(self, first: int = 0) -> Iterator[Entry]:
        """The entries in the archive's order, from the number `first` on."""
        parent, depth, prefix = None, 0, b""
        for number in range(first, len(self)):
            name, target = self._text(number)
            if number == 0:
                path = self._root
            else:
                if self._parents[number] != parent:
                    parent = self._parents[number]
                    depth, prefix = self._within(parent)
                path = prefix + name
            size = 0 if target else self._sizes[number]
            yield Entry(depth, path, _KINDS[self._kinds[number]], size, target)

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

    def _text(self, number: int) -> tuple[bytes, bytes]:
        """The name of an entry, and what it points to."""
        text = bytes(self._texts[self._ends[number - 1] if number else 0 : self._ends[number]])
        split = len(text) - (self._sizes[number] if self._kinds[number] == _SYMLINK else 0)
        return text[:split], text[split:]

    def _within(self, directory: int) -> tuple[int, bytes]:
        """The depth of what is in a directory, and what its paths begin with."""
        names = []
        while directory:
            names.append(self._text(directory)[0])
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

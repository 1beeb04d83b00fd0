"""Layout of a NAR: its entries as one walk found them, from which any part of the archive follows without another walk.

The entries are packed into blocks. A block begins with the directory that its first entry is in, so that it can be
read alone. An index of 20 bytes for each block tells where in the archive the block begins, where the block is kept,
and its checksum. Blocks are in memory until a file takes them.

One thread fills a layout, while any number of readers follow it. A reader holds one block at a time. Where the next is
not there yet, the reader gets a future and waits for it in its own way: no thread has to.
"""

import stat
import threading
import zlib
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from copy import copy
from typing import Protocol

import msgspec

from harmonia.errors import CacheFileError
from harmonia.nix.nar import Entry, FileSlice, Segment, serialize
from harmonia.nix.nar import window as cut
from harmonia.store import tree_reader

_BLOCK_MAX_ENTRIES = 256  # in a block
_MAX_TEXT_BYTES = 32 * 1024  # of names and targets in a block, give or take one entry: what a slow reader holds
_SPILL_BYTES = 1 << 20  # of blocks in memory, from which on they go to a file
_KEPT_MODE = stat.S_IFMT(0xFFFF) | stat.S_IXUSR  # the file type, and whether it is executable

_Row = tuple[int, int, int, bytes, bytes]  # of an `Entry`, with its name in place of its path
_Block = tuple[bytes, list[_Row]]
_encoder = msgspec.msgpack.Encoder()
_block_decoder = msgspec.msgpack.Decoder(_Block)
_index_decoder = msgspec.msgpack.Decoder(tuple[int, int, bytes, bytes, bytes])
_INDEX_SIZE_BYTES = 8


class BlockFile(Protocol):
    """File that takes blocks, and gives any part of what it took. OSError if the disk fails."""

    def append(self, data: bytes) -> None: ...

    def read(self, start: int, stop: int) -> bytes: ...


class Layout:
    """The layout of the archive of what is at `root`, whole or still growing."""

    def __init__(self, root: bytes) -> None:
        self._root = root
        self.size: int | None = None
        """Bytes of the archive, once the layout is whole."""
        self.error: BaseException | None = None
        """Why the walk ended early, if it did."""
        self.entries = 0
        self._covered = 0  # bytes of the archive that the blocks so far account for
        self._offsets = array("Q")  # where in the archive the contents of each block's first entry begin
        self._ends = array("Q")  # where among all packed blocks each one ends
        self._checksums = array("I")
        self._memory: dict[int, bytes] = {}  # blocks that are in no file
        self._memory_bytes = 0
        self._file: BlockFile | None = None
        self._lock = threading.Lock()  # for what follows; all else has one writer
        self._waiting: list[tuple[int, int | None, Future[bytes]]] = []

    @classmethod
    def of(cls, root: bytes) -> "Layout":
        """Walk what is at `root`, and return its whole layout."""
        layout = cls(root)
        for _ in layout.record(tree_reader.walk(root)):
            pass
        return layout

    @property
    def memory(self) -> int:
        """Bytes of memory that it takes, its blocks and its index."""
        columns = (self._offsets, self._ends, self._checksums)
        return self._memory_bytes + sum(column.itemsize * len(column) for column in columns)

    @property
    def is_large(self) -> bool:
        """Whether its blocks should go to a file."""
        return self._memory_bytes > _SPILL_BYTES

    @property
    def is_in_file(self) -> bool:
        """Whether some of its blocks are in a file, which it keeps open."""
        return self._file is not None

    # The one writer.

    def record(self, entries: Iterable[Entry]) -> Iterator[None]:
        """Take the entries of a whole archive, and pause after each block."""
        rows: list[_Row] = []
        directory = b""
        position = offset = text = 0
        for words, entry in serialize(entries):
            position += len(words)
            if entry is None:
                break
            depth, path, mode, size, target = entry
            parent, _, name = path.rpartition(b"/") if depth else (self._root, b"", b"")
            if not rows:
                offset, directory = position, parent[len(self._root) + 1 :]
            rows.append((depth, mode & _KEPT_MODE, size, name, target))
            position += size
            text += len(name) + len(target)
            if len(rows) == _BLOCK_MAX_ENTRIES or text >= _MAX_TEXT_BYTES:
                self._append(offset, position, directory, rows)
                self._wake()
                rows, text = [], 0
                yield
        with self._lock:  # who sees the last block sees the size as well
            if rows:
                self._append(offset, position, directory, rows)
            self.size = position
        self._wake()

    def spill(self, file: BlockFile) -> None:
        """Move the blocks to a file, which takes all later ones too, whenever this is called. OSError."""
        for number, block in list(self._memory.items()):
            file.append(block)
            self._file = file  # before the block is gone from memory, for those who read it meanwhile
            del self._memory[number]
            self._memory_bytes -= len(block)

    def seal(self, file: BlockFile) -> None:
        """Move what is left to the file, and add the index by which `load` finds the blocks. OSError."""
        self.spill(file)
        columns = (self._offsets.tobytes(), self._ends.tobytes(), self._checksums.tobytes())
        index = _encoder.encode((self.size, self.entries, *columns))
        file.append(index + len(index).to_bytes(_INDEX_SIZE_BYTES, "little"))

    def load(self, file: BlockFile, size: int) -> None:
        """Become the whole layout that was sealed in a file of that size. CacheFileError, OSError."""
        end = size - _INDEX_SIZE_BYTES
        length = int.from_bytes(file.read(end, size), "little")
        try:
            whole, self.entries, offsets, ends, checksums = _index_decoder.decode(file.read(end - length, end))
            self._offsets.frombytes(offsets)
            self._ends.frombytes(ends)
            self._checksums.frombytes(checksums)
        except (ValueError, msgspec.MsgspecError) as error:
            raise CacheFileError(f"its kept layout is damaged: {error}") from None
        self._file = file
        self.size = whole
        self._wake()

    def fail(self, error: BaseException) -> None:
        """End with an error, for all who follow."""
        self.error = error
        self._wake()

    # Any number of readers.

    def wait_whole(self) -> Future[bytes] | None:
        """Return a future that ends when the layout is whole or has failed; None if it is so already."""
        return self._wait(-1, None)

    def wait_covered(self, stop: int) -> Future[bytes] | None:
        """Return a future that ends when it covers the archive up to `stop`, or has ended; None if it does already."""
        return self._wait(-1, stop)

    def located(self) -> Iterator[tuple[int, Entry]]:
        """The entries of a whole layout, each with the offset of its contents in the archive."""
        position = 0
        for words, entry in serialize(entry for block in self._follow(0) for entry in self._entries(block)):
            position += len(words)
            if entry is not None:
                yield position, entry
                position += entry.size

    def window(self, start: int, stop: int) -> Iterator[Segment | Future[bytes]]:
        """The bytes from `start` to `stop` of the archive, as they become known. A future stands for a wait."""
        first = max(bisect_right(self._offsets, start) - 1, 0)
        position = self._offsets[first] if first else 0
        skip_words = first > 0  # of its first entry: they are those of an archive that begins with it
        entries: deque[Entry | None] = deque()
        frames = serialize(iter(entries.popleft, None))  # one entry goes in for each frame that comes out
        for block in self._follow(first):
            if isinstance(block, Future):
                yield block
                continue
            for entry in self._entries(block):
                entries.append(entry)
                words, _ = next(frames)
                if skip_words:
                    words, skip_words = b"", False
                end = position + len(words) + entry.size
                if start < end:
                    archive: list[Segment] = [words] if words else []
                    if entry.size:
                        archive.append(FileSlice(entry.path, entry.size, 0, entry.size))
                    is_inside = start <= position and end <= stop
                    yield from archive if is_inside else cut(archive, start - position, stop - position)
                position = end
                if position >= stop:
                    return
        entries.append(None)
        words, _ = next(frames)
        yield from cut([words], start - position, stop - position)

    def _follow(self, number: int) -> Iterator[_Block | Future[bytes]]:
        """The blocks from that one on, and a future wherever the next is not there yet."""
        while True:
            if waiting := self._wait(number, None):
                yield waiting
            elif number < len(self._checksums):
                yield self._read(number)
                number += 1
            elif self.error is not None:
                raise copy(self.error)  # each with a traceback of its own, which holds no other reader
            else:
                return

    def _entries(self, block: _Block | Future[bytes]) -> Iterator[Entry]:
        if isinstance(block, Future):
            raise TypeError("the layout is not whole")
        directory, rows = block
        prefixes = [b"", self._root + b"/"]  # of the paths at each depth
        for name in directory.split(b"/") if directory else ():
            prefixes.append(prefixes[-1] + name + b"/")
        for depth, mode, size, name, target in rows:
            path = prefixes[depth] + name if depth else self._root
            if stat.S_ISDIR(mode):
                del prefixes[depth + 1 :]
                prefixes.append(path + b"/")
            yield Entry(depth, path, mode, size, target)

    def _read(self, number: int) -> _Block:
        data = self._memory.get(number)
        if data is None:
            if self._file is None:
                raise CacheFileError("its layout has lost a block")
            data = self._file.read(self._ends[number - 1] if number else 0, self._ends[number])
        if zlib.crc32(data) != self._checksums[number]:
            raise CacheFileError("its kept layout is damaged")
        block: _Block = _block_decoder.decode(data)
        return block

    def _append(self, offset: int, position: int, directory: bytes, rows: list[_Row]) -> None:
        block = _encoder.encode((directory, rows))
        number = len(self._checksums)
        self._memory[number] = block
        self._memory_bytes += len(block)
        self.entries += len(rows)
        self._offsets.append(offset)
        self._ends.append((self._ends[-1] if number else 0) + len(block))
        self._checksums.append(zlib.crc32(block))  # last: by their number readers know how many there are
        self._covered = position

    def _is_due(self, number: int, stop: int | None) -> bool:
        if self.size is not None or self.error is not None:
            return True
        return number >= 0 and number < len(self._checksums) if stop is None else stop <= self._covered

    def _wait(self, number: int, stop: int | None) -> Future[bytes] | None:
        """Return a future of block `number`, or of the bytes up to `stop`; None if they are there."""
        with self._lock:
            if self._is_due(number, stop):
                return None
            future: Future[bytes] = Future()
            self._waiting.append((number, stop, future))
            return future

    def _wake(self) -> None:
        with self._lock:
            if not self._waiting:
                return
            due = [future for number, stop, future in self._waiting if self._is_due(number, stop)]
            self._waiting = [each for each in self._waiting if not self._is_due(*each[:2])]
        for future in due:
            if future.set_running_or_notify_cancel():
                future.set_result(b"")

"""Layout of a NAR: the entries of one walk, from which any byte range of the archive is made without another walk.

The entries are packed into blocks. A block starts with the directory of its first entry, so it can be decoded
independently. An index with 20 bytes for each block stores the block's offset in the archive, its place, and its
checksum. Blocks are in memory until they are moved to a file.

One thread fills a layout, while any number of readers follow. A reader holds one block at a time. If the next block
does not exist yet, the reader gets a future to wait for, so a wait occupies no thread.
"""

import stat
import threading
import zlib
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from copy import copy
from functools import partial
from time import perf_counter
from typing import NamedTuple, Protocol, Self

import msgspec

from harmonia.errors import CacheFileError
from harmonia.nix.nar import Entry, FileSlice, Segment, serialize
from harmonia.nix.nar import window as cut
from harmonia.store import tree_reader

_BLOCK_MAX_ENTRIES = 256
_MAX_TEXT_BYTES = 32 * 1024  # of names and targets in a block, plus one entry; bounds the memory of a slow reader
_FOLLOWERS_WAIT_S = 0.1  # a reader that runs beside the walk slows both down, because they fight for the GIL
_SPILL_BYTES = 1 << 20  # size of the blocks in memory above which they are moved to a file
_KEPT_MODE = stat.S_IFMT(0xFFFF) | stat.S_IXUSR  # the bits of a mode that a NAR stores

_Row = tuple[int, int, int, bytes, bytes]  # an `Entry` with its name instead of its path
_Block = tuple[bytes, list[_Row]]
_encoder = msgspec.msgpack.Encoder()
_block_decoder = msgspec.msgpack.Decoder(_Block)
_index_decoder = msgspec.msgpack.Decoder(tuple[int, int, bytes, bytes, bytes])
_INDEX_SIZE_BYTES = 8


class BlockFile(Protocol):
    """File for the blocks of a layout. Its methods raise OSError if the disk fails. The layout closes it."""

    def append(self, data: bytes) -> None:
        """Append a block or the index."""

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start` to `stop` of the appended data."""

    def close(self) -> None: ...


class _Waiter(NamedTuple):
    """A reader that waits until `is_due` returns True, or until the layout is complete or has failed."""

    is_due: Callable[[], bool]
    is_follower: bool
    """True if the reader needs the next block. It may wait a little longer, see _FOLLOWERS_WAIT_S."""
    future: Future[bytes]


class Layout:
    """The layout of the archive of the tree at `root`, complete or still growing. Each of its owners closes it."""

    def __init__(self, root: bytes) -> None:
        """Create an empty layout with one owner."""
        self._root = root
        self.size: int | None = None
        """The length of the archive in bytes, or None until the layout is complete."""
        self.error: BaseException | None = None
        """The error that ended the walk early."""
        self.entries = 0
        """The number of entries so far."""
        self._covered = 0  # length of the part of the archive that the blocks so far describe
        self._offsets = array("Q")  # for each block, the offset in the archive of its first entry's contents
        self._ends = array("Q")  # for each block, the offset of its end in all packed blocks
        self._checksums = array("I")
        self._memory: dict[int, bytes] = {}  # blocks in memory, by number
        self._memory_bytes = 0
        self._file: BlockFile | None = None
        self._owners = 1
        self._lock = threading.Lock()  # for _waiters, for _owners, and for the step to a complete layout
        self._waiters: list[_Waiter] = []

    @classmethod
    def of(cls, root: bytes) -> "Layout":
        """Walk the tree at `root`, and return its complete layout."""
        layout = cls(root)
        for _ in layout.record(tree_reader.walk(root)):
            pass
        return layout

    def share(self) -> Self:
        """Return the same layout for another owner, who closes it as well."""
        with self._lock:
            self._owners += 1
        return self

    def close(self) -> None:
        """Close the file, if this was the last owner."""
        with self._lock:
            self._owners -= 1
            is_last = not self._owners
        if is_last and self._file is not None:
            self._file.close()

    @property
    def memory(self) -> int:
        """Return the memory use in bytes of the blocks in memory and of the index."""
        columns = (self._offsets, self._ends, self._checksums)
        return self._memory_bytes + sum(column.itemsize * len(column) for column in columns)

    @property
    def is_large(self) -> bool:
        """True if the blocks should be moved to a file."""
        return self._memory_bytes > _SPILL_BYTES

    @property
    def is_in_file(self) -> bool:
        """True if some of the blocks are in a file, which then must stay open."""
        return self._file is not None

    # Methods for the one writer.

    def record(self, entries: Iterable[Entry]) -> Iterator[None]:
        """Record the entries of the complete archive. Yield after each block, so that the caller can do other work."""
        rows: list[_Row] = []
        directory = b""
        position = offset = text = 0
        wakes_at = perf_counter() + _FOLLOWERS_WAIT_S
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
                if wakes_followers := perf_counter() >= wakes_at:
                    wakes_at = perf_counter() + _FOLLOWERS_WAIT_S
                self._wake(followers=wakes_followers)
                rows, text = [], 0
                yield
        with self._lock:  # a reader that sees the last block must also see the size
            if rows:
                self._append(offset, position, directory, rows)
            self.size = position
        self._wake()

    def spill(self, file: BlockFile) -> None:
        """Move the blocks in memory to a file. Later calls must pass the same file.

        The layout takes over the file: the last owner's `close` closes it. Raises OSError if the disk fails.
        """
        self._file = file  # set before a block is deleted, because readers look in memory first
        for number, block in list(self._memory.items()):
            file.append(block)
            del self._memory[number]
            self._memory_bytes -= len(block)

    def seal(self, file: BlockFile) -> None:
        """Move the remaining blocks to the file, and append the index that `load` needs.

        Raises OSError if the disk fails.
        """
        self.spill(file)
        columns = (self._offsets.tobytes(), self._ends.tobytes(), self._checksums.tobytes())
        index = _encoder.encode((self.size, self.entries, *columns))
        file.append(index + len(index).to_bytes(_INDEX_SIZE_BYTES, "little"))

    def load(self, file: BlockFile, size: int) -> None:
        """Load the complete layout from a file of `size` bytes that `seal` has written. Take over the file on success.

        Raises CacheFileError if the index is damaged, and OSError if the disk fails.
        """
        end = size - _INDEX_SIZE_BYTES
        length = int.from_bytes(file.read(end, size), "little")
        try:
            archive_size, self.entries, offsets, ends, checksums = _index_decoder.decode(file.read(end - length, end))
            self._offsets.frombytes(offsets)
            self._ends.frombytes(ends)
            self._checksums.frombytes(checksums)
        except (ValueError, msgspec.MsgspecError) as error:
            raise CacheFileError(f"the stored layout is damaged: {error}") from None
        self._file = file
        self.size = archive_size
        self._wake()

    def fail(self, error: BaseException) -> None:
        """End the layout with an error, which all readers raise."""
        self.error = error
        self._wake()

    # Methods for any number of readers.

    def wait_whole(self) -> Future[bytes] | None:
        """Return a future that completes when the layout is complete or has failed, or None if it already is or has."""
        return self._wait(lambda: False)

    def wait_covered(self, stop: int) -> Future[bytes] | None:
        """Return a future that completes when the archive is described up to `stop`, or None if it already is.

        The future also completes when the layout is complete or has failed.
        """
        return self._wait(lambda: stop <= self._covered)

    def located(self) -> Iterator[tuple[int, Entry]]:
        """Yield the entries of a complete layout, each with the offset in bytes of its contents in the archive."""
        position = 0
        for words, entry in serialize(entry for block in self._follow(0) for entry in self._entries(block)):
            position += len(words)
            if entry is not None:
                yield position, entry
                position += entry.size

    def window(self, start: int, stop: int) -> Iterator[Segment | Future[bytes]]:
        """Yield the segments of the byte range from `start` to `stop`. Yield a future if the reader has to wait."""
        first = max(bisect_right(self._offsets, start) - 1, 0)
        position = self._offsets[first] if first else 0
        skip_words = first > 0  # its first words are those of the start of an archive, so they are wrong here
        entries: deque[Entry | None] = deque()
        headers = serialize(iter(entries.popleft, None))  # consumes one entry for each header that it yields
        for block in self._follow(first):
            if isinstance(block, Future):
                yield block
                continue
            for entry in self._entries(block):
                entries.append(entry)
                words, _ = next(headers)
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
        words, _ = next(headers)
        yield from cut([words], start - position, stop - position)

    def _follow(self, number: int) -> Iterator[_Block | Future[bytes]]:
        """Yield the blocks from `number` on. Yield a future if the next block does not exist yet."""
        while True:
            if waiting := self._wait(partial(self._has_block, number), is_follower=True):
                yield waiting
            elif self._has_block(number):
                yield self._read(number)
                number += 1
            elif self.error is not None:
                raise copy(self.error)  # a shared error's traceback would refer to the frames of other readers
            else:
                return

    def _entries(self, block: _Block | Future[bytes]) -> Iterator[Entry]:
        if isinstance(block, Future):
            raise TypeError("the layout is not complete")
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
                raise CacheFileError("the layout has lost a block")
            data = self._file.read(self._ends[number - 1] if number else 0, self._ends[number])
        if zlib.crc32(data) != self._checksums[number]:
            raise CacheFileError("the stored layout is damaged")
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
        self._checksums.append(zlib.crc32(block))  # last, because readers count the blocks by the checksums
        self._covered = position

    def _has_block(self, number: int) -> bool:
        return number < len(self._checksums)

    def _has_ended(self) -> bool:
        return self.size is not None or self.error is not None

    def _wait(self, is_due: Callable[[], bool], *, is_follower: bool = False) -> Future[bytes] | None:
        """Return a future that completes when `is_due` returns True or the layout has ended, or None if that is now."""
        with self._lock:
            if self._has_ended() or is_due():
                return None
            waiter = _Waiter(is_due, is_follower, Future())
            self._waiters.append(waiter)
            return waiter.future

    def _wake(self, *, followers: bool = True) -> None:
        """Complete the futures of the readers that need not wait any more: of all, or only if they do not follow."""
        with self._lock:
            waiters, self._waiters = self._waiters, []
            due: list[_Waiter] = []
            for waiter in waiters:
                is_woken = (followers or not waiter.is_follower) and (self._has_ended() or waiter.is_due())
                (due if is_woken else self._waiters).append(waiter)
        for waiter in due:
            if waiter.future.set_running_or_notify_cancel():
                waiter.future.set_result(b"")

"""New store paths that are still to be processed, newest first, in memory that does not grow with their number."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress

from harmonia.nix.store_path import StorePath
from harmonia.store.new_paths import Cursor, NewPath, NewPaths
from harmonia.store.newly_published import NewlyPublished
from harmonia.store.publish_policy import PublishPolicy
from harmonia.store.store import Store

_PAGE_PATHS = 64  # between two looks for newer paths
_MAX_RANGES = 1000


class Backlog:
    """New paths after a cursor in a file. Not thread-safe, like the store."""

    def __init__(self, store: Store, db_path: str, policy: PublishPolicy | None, file: str) -> None:
        """Open nothing yet. Without the file, or with that of another database, begin after the newest path."""
        self._new_paths = NewPaths(store, db_path)
        self._published: NewlyPublished[NewPath] = NewlyPublished(store, policy)
        self._file = file
        self._cursor: Cursor | None = None
        self._saved: Cursor | None = None
        self._ranges: list[tuple[int, int]] = []
        """Ranges of numbers to process, each above the first number, up to the second. The last one is the newest."""

    def paths(self) -> Iterator[StorePath]:
        """Yield the paths that the publish policy allows, until none is left.

        Raises StoreUnavailableError if the database cannot be read. A later call continues; after one that ended early,
        it repeats a page of paths.
        """
        while self._look():
            after, last = self._ranges[-1]
            page, left = self._new_paths.newest_first(after, last, _PAGE_PATHS)
            yield from (each.path for each in self._published.select(page))
            self._ranges[-1:] = [(after, left)] if left > after else []
        if self._published.is_due:
            yield from (each.path for each in self._published.select([]))

    def _look(self) -> bool:
        """Look for newer paths. Return True if any are left."""
        newest = self._new_paths.newest()
        if self._cursor is None:
            self._cursor = self._saved = self._read()
        if self._cursor is None or self._cursor.database != newest.database or self._cursor.number > newest.number:
            self._ranges.clear()
            self._published.forget()
        elif newest.number > self._cursor.number:
            self._ranges.append((self._cursor.number, newest.number))
            if len(self._ranges) > _MAX_RANGES:  # some paths between them are then processed twice
                self._ranges[:2] = [(self._ranges[0][0], self._ranges[1][1])]
        self._cursor = newest
        return bool(self._ranges)

    def save(self) -> None:
        """Save the cursor. Call it after all paths were processed. Raises OSError if the file cannot be written."""
        if self._cursor is not None and self._cursor != self._saved and not self._ranges:
            temporary = f"{self._file}.new"
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump(self._cursor, file)
            os.replace(temporary, self._file)
            self._saved = self._cursor

    def _read(self) -> Cursor | None:
        with suppress(OSError, ValueError, TypeError), open(self._file, encoding="utf-8") as file:
            database, number = json.load(file)
            if isinstance(number, int):
                return Cursor(database, number)
        return None

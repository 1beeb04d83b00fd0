"""What a store has, for people: search by name, who refers to a path, and how much its closure takes.

These look at many rows. Each is bounded, and tells when it did not see them all.
"""

import json
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from harmonia.errors import FormatError
from harmonia.nix.base32 import ALPHABET
from harmonia.nix.store_path import HASH_PART_LENGTH, StorePath
from harmonia.store.store import Store

_SEARCH_TIME_S = 0.5  # seconds; a million paths take as long
_BATCH_PATHS = 20_000  # paths between two looks at the clock
_MAX_CANDIDATES = 5_000  # matches to find the best among
_CLOSURE_MAX_PATHS = 50_000  # paths that are counted; some 0.3 s

# Paths are asked for as text: SQLite lets a column hold anything (store.py).

# The index on `path` holds all that it takes: no row is read. A batch is one row, for those that match are few.
_MATCHES = r"""
with batch as (
  select path, substr(cast(path as text), ?) as base_name from ValidPaths where path > ? order by path limit ?)
select max(path), group_concat(case when substr(base_name, ?) like ? escape '\' or base_name like ? escape '\'
  then base_name end, ' ') from batch
"""

_REFERRERS = """
with referrers(id) as (
  select referrer from Refs join ValidPaths as asked on asked.id = reference
  where asked.path = ? and referrer != reference)
select (select count(*) from referrers), substr(cast(path as text), ?)
from (select id from referrers limit ?) join ValidPaths using (id)
"""

_OF_CLOSURE = """
with recursive closure(id) as (
  select id from ValidPaths where path in (select value from json_each(?))
  union select reference from Refs join closure on referrer = closure.id limit ?)
select {} from closure join ValidPaths using (id)
"""
_NO_LIMIT = -1

# No index has it. It is only asked if there is a publish policy.
_OUTPUTS = "select cast(path as text) from ValidPaths where deriver = ? limit ?"
_MAX_OUTPUTS = 100


PublishFilter = Callable[[StorePath], bool] | None
"""Tells whether a path is published; None if all are."""


class Paths(NamedTuple):
    """Some paths, and how many there are. Of a search that was cut short, at least so many."""

    shown: list[StorePath]
    total: int
    complete: bool = True


class Closure(NamedTuple):
    """The paths that one needs, itself among them, and the sum of their NAR sizes: at least, if not `complete`."""

    paths: int
    size: int
    complete: bool


def search(store: Store, text: str, limit: int, published: PublishFilter = None) -> Paths:
    """The paths whose name has the words of `text` in their order, or whose hash part begins with it; best first.

    With `published`, only paths for which it is true.
    """
    words = text.casefold().split()
    if not words:
        return Paths([], 0)

    def order(path: StorePath) -> tuple[object, ...]:
        name = path.name.casefold()
        return name != words[0], not name.startswith(words[0]), path.is_derivation, len(name), name, path

    in_name = "%" + "%".join(map(_literally, words)) + "%"
    in_hash = f"{words[0]}%" if len(words) == 1 and set(words[0]) <= set(ALPHABET) else ""
    prefix = len(store.store_dir) + 1
    deadline = time.monotonic() + _SEARCH_TIME_S
    found: list[StorePath] = []
    last: str | None = ""
    while len(found) < _MAX_CANDIDATES and time.monotonic() < deadline:
        pattern = (HASH_PART_LENGTH + 2, in_name, in_hash)
        [(last, matches)] = store.database.query(_MATCHES, prefix + 1, last, _BATCH_PATHS, *pattern)
        for path in filter(None, map(_store_path, (matches or "").split())):
            if published is None or published(path):
                found.append(path)
            if published is not None and time.monotonic() > deadline:
                return Paths(sorted(found, key=order)[:limit], len(found), complete=False)
        if last is None:
            break

    return Paths(sorted(found, key=order)[:limit], len(found), complete=last is None)


def referrers(store: Store, path: StorePath, limit: int, published: PublishFilter = None) -> Paths:
    """The valid paths that refer to `path`, but for itself. With `published`, only paths for which it is true."""
    asked = limit if published is None else _MAX_CANDIDATES
    rows = store.database.query(_REFERRERS, f"{store.store_dir}/{path}", len(store.store_dir) + 2, asked)
    shown = filter(None, (_store_path(referrer) for _, referrer in rows))
    if published is not None:
        found = sorted(filter(published, shown), key=by_name)
        return Paths(found[:limit], len(found), complete=len(rows) < asked)
    return Paths(sorted(shown, key=by_name), rows[0][0] if rows else 0)


def outputs(store: Store, derivation: StorePath) -> list[StorePath]:
    """The valid paths that came of a derivation, which need not be there any more."""
    rows = store.database.query(_OUTPUTS, f"{store.store_dir}/{derivation}", _MAX_OUTPUTS)
    names = (path.removeprefix(f"{store.store_dir}/") for (path,) in rows)
    return list(filter(None, map(_store_path, names)))


def by_name(path: StorePath) -> tuple[str, str]:
    """How people look for it: not by the hash, which comes first."""
    return path.name, path


def closure_size(store: Store, path: StorePath) -> Closure:
    """Count the path and all that it refers to, in turn."""
    [(count, sizes, size)] = _of_closure(store, "count(*), count(narSize), sum(narSize)", [path], _CLOSURE_MAX_PATHS)
    return Closure(count, size or 0, complete=count < _CLOSURE_MAX_PATHS and count == sizes)


def closure_paths(store: Store, paths: Iterable[StorePath]) -> list[StorePath]:
    """Return the paths that are valid, and all that they refer to, in turn. Raises FormatError if one has no name."""
    rows = _of_closure(store, "substr(cast(path as text), ?)", paths, _NO_LIMIT, len(store.store_dir) + 2)
    return [StorePath(name) for (name,) in rows]


def closure_hash_parts(store: Store, paths: Iterable[StorePath], limit: int) -> frozenset[str]:
    """Return the hash parts of these paths as far as they are valid, and of all that they refer to, in turn."""
    start = len(store.store_dir) + 2
    rows = _of_closure(store, "substr(path, ?, ?)", paths, limit, start, HASH_PART_LENGTH)
    return frozenset(hash_part for (hash_part,) in rows)


def _of_closure(
    store: Store, columns: str, paths: Iterable[StorePath], limit: int, *parameters: object
) -> list[tuple[Any, ...]]:
    """Return these columns of the paths that a closure has, at most so many."""
    named = json.dumps([f"{store.store_dir}/{path}" for path in paths])
    return store.database.query(_OF_CLOSURE.format(columns), named, limit, *parameters)


def _literally(word: str) -> str:
    return "".join(f"\\{letter}" if letter in "\\%_" else letter for letter in word)


def _store_path(base_name: str) -> StorePath | None:
    try:
        return StorePath(base_name)
    except FormatError:
        return None

"""Queries for the pages that people browse: search by name, referrers, outputs, and size of a closure.

Each query reads many rows, but has a limit. Its result shows if the limit was reached.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

from harmonia.errors import FormatError
from harmonia.nix.base32 import ALPHABET
from harmonia.nix.package_name import PackageName
from harmonia.nix.store_path import HASH_PART_LENGTH, StorePath
from harmonia.store.store import Store

_SEARCH_TIME_S = 0.5  # enough for a million paths
_BATCH_PATHS = 20_000  # between two checks of the time
_MAX_CANDIDATES = 5_000  # matches from which the best are chosen
_CLOSURE_MAX_PATHS = 50_000  # counted in some 0.3 s

# `cast(path as text)`: SQLite lets a column hold values of any type.

# The index on `path` covers this query, so no table row is read. The few matches of a batch come as one row.
_MATCHES = r"""
with batch as (
  select path, substr(cast(path as text), ?) as base_name from ValidPaths where path > ? order by path limit ?)
select max(path), group_concat(case when substr(base_name, ?) like ? escape '\' or base_name like ? escape '\'
  then base_name end, ' ') from batch
"""

# Newest first, without derivations, which people rarely look for.
_NEWEST_PATHS = """
select substr(cast(path as text), ?), cast(narSize as integer), cast(registrationTime as integer)
from (select path, narSize, registrationTime from ValidPaths order by id desc limit ?) where path not like '%.drv'
"""

_LISTED = """
select substr(cast(path as text), ?), cast(narSize as integer), cast(registrationTime as integer)
from ValidPaths where path in (select value from json_each(?))
"""

_NAR_HASHES = "select cast(path as text), cast(hash as text) from ValidPaths"

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

_REFERENCES_IN_CLOSURE = """
with recursive closure(id) as (
  select id from ValidPaths where path = ?
  union select reference from Refs join closure on referrer = closure.id limit ?)
select referrer, reference from closure join Refs on referrer = closure.id where referrer != reference
"""

# No index covers this query. It runs only if there is a publish policy.
_OUTPUTS = "select cast(path as text) from ValidPaths where deriver = ? limit ?"
_NAMED_OUTPUTS = """
select cast(DerivationOutputs.id as text), cast(DerivationOutputs.path as text)
from DerivationOutputs join ValidPaths on ValidPaths.id = drv where ValidPaths.path = ? limit ?
"""
_MAX_OUTPUTS = 100

_NUMBER = re.compile("([0-9]+)")
_MAX_TIME = 253402300799  # the end of the year 9999

PublishFilter = Callable[[StorePath], bool] | None
"""A function that returns whether a path is published, or None if all paths are."""


class Paths(NamedTuple):
    """The first results of a query, and the number of all results."""

    shown: list[StorePath]
    total: int
    """The number of all results; a lower bound if not `complete`."""
    complete: bool = True


class ListedPath(NamedTuple):
    """A path in a list for people."""

    path: StorePath
    nar_size: int
    """In bytes; 0 if it is unknown."""
    registered: int
    """The time at which the path became valid, in seconds since 1970."""

    @property
    def package(self) -> str:
        """Return the name of the path's package. A derivation belongs to the package that it builds."""
        return PackageName.parse(self.path.name.removesuffix(".drv")).name


class Found(NamedTuple):
    """A part of the results of a search, and the number of all results."""

    shown: list[ListedPath]
    total: int
    """The number of all results; a lower bound if not `complete`."""
    complete: bool = True


class Closure(NamedTuple):
    """The size of a path's closure. Both numbers are lower bounds if not `complete`."""

    paths: int
    """The number of paths, including the path itself."""
    size: int
    """The sum of the NAR sizes in bytes."""
    complete: bool


def search(store: Store, text: str, limit: int, published: PublishFilter = None, *, start: int = 0) -> Found:
    """Return at most `limit` results of a search from the number `start` on, the best matches first.

    A path matches if its name contains the words of `text` in their order, or if its hash part starts with `text`.
    The paths of a package follow each other, the versions in natural order: 1.10 after 1.9.
    With `published`, only paths for which it is true count.
    """
    words = text.casefold().split()
    if not words:
        return Found([], 0)

    def order(listed: ListedPath) -> tuple[object, ...]:
        name, package = listed.path.name.casefold(), listed.package.casefold()
        relevance = name != words[0], listed.path.is_derivation, not name.startswith(words[0]), len(package), package
        return *relevance, natural(name), -listed.registered, listed.path

    matches, complete = _matches(store, words, published)
    found = sorted(list_paths(store, matches), key=order)
    return Found(found[start : start + limit], len(found), complete)


def _matches(store: Store, words: Sequence[str], published: PublishFilter) -> tuple[list[StorePath], bool]:
    """Return the paths that match a search, and whether these are all."""
    in_name = "%" + "%".join(map(_literally, words)) + "%"
    in_hash = f"{words[0]}%" if len(words) == 1 and set(words[0]) <= set(ALPHABET) else ""
    prefix = len(store.store_dir) + 1
    deadline = time.monotonic() + _SEARCH_TIME_S
    candidates: list[StorePath] = []
    last: str | None = ""
    while len(candidates) < _MAX_CANDIDATES and time.monotonic() < deadline:
        pattern = (HASH_PART_LENGTH + 2, in_name, in_hash)
        [(last, matches)] = store.database.query(_MATCHES, prefix + 1, last, _BATCH_PATHS, *pattern)
        for path in filter(None, map(_store_path, (matches or "").split())):
            if published is None or published(path):
                candidates.append(path)
            if published is not None and time.monotonic() > deadline:
                return candidates, False
        if last is None:
            break
    return candidates[:_MAX_CANDIDATES], last is None and len(candidates) <= _MAX_CANDIDATES


def natural(text: str) -> tuple[object, ...]:
    """Return the sort key that compares the numbers in a text by their values: 1.10 after 1.9."""

    def value(digits: str) -> tuple[int, str]:
        significant = digits.lstrip("0")
        return len(significant), significant

    return tuple(value(part) if place % 2 else part for place, part in enumerate(_NUMBER.split(text)))


def list_paths(store: Store, paths: Iterable[StorePath]) -> list[ListedPath]:
    """Return the valid ones of `paths` with their sizes and times, in any order."""
    named = json.dumps([f"{store.store_dir}/{path}" for path in paths])
    return list(_listed(store.database.query(_LISTED, len(store.store_dir) + 2, named)))


def newest(store: Store, limit: int, published: PublishFilter = None) -> list[ListedPath]:
    """Return at most `limit` paths that became valid most recently, the newest first, without derivations.

    With `published`, only paths for which it is true count.
    """
    rows = store.database.query(_NEWEST_PATHS, len(store.store_dir) + 2, _MAX_CANDIDATES)
    return list(islice((each for each in _listed(rows) if published is None or published(each.path)), limit))


def _listed(rows: Iterable[tuple[str, int | None, int | None]]) -> Iterator[ListedPath]:
    """Yield the paths of the rows, without malformed ones."""
    for base_name, size, registered in rows:
        if (path := _store_path(base_name)) is not None:
            yield ListedPath(path, max(size or 0, 0), min(max(registered or 0, 0), _MAX_TIME))


def referrers(store: Store, path: StorePath, limit: int, published: PublishFilter = None) -> Paths:
    """Return at most `limit` valid paths that refer to `path`, without `path` itself.

    With `published`, only paths for which it is true count.
    """
    max_rows = limit if published is None else _MAX_CANDIDATES
    rows = store.database.query(_REFERRERS, f"{store.store_dir}/{path}", len(store.store_dir) + 2, max_rows)
    shown = filter(None, (_store_path(referrer) for _, referrer in rows))
    if published is not None:
        permitted = sorted(filter(published, shown), key=by_name)
        return Paths(permitted[:limit], len(permitted), complete=len(rows) < max_rows)
    return Paths(sorted(shown, key=by_name), rows[0][0] if rows else 0)


def outputs(store: Store, derivation: StorePath) -> list[StorePath]:
    """Return the valid paths that a derivation has built. The derivation itself need not exist any more."""
    rows = store.database.query(_OUTPUTS, f"{store.store_dir}/{derivation}", _MAX_OUTPUTS)
    names = (path.removeprefix(f"{store.store_dir}/") for (path,) in rows)
    return list(filter(None, map(_store_path, names)))


def named_outputs(store: Store, derivation: StorePath) -> dict[str, StorePath]:
    """Return the paths of the outputs of a valid derivation by their names, as far as they are known."""
    rows = store.database.query(_NAMED_OUTPUTS, f"{store.store_dir}/{derivation}", _MAX_OUTPUTS)
    paths = {name: _store_path(path.removeprefix(f"{store.store_dir}/")) for name, path in rows}
    return {name: path for name, path in paths.items() if path is not None}


def by_name(path: StorePath) -> tuple[str, str]:
    """Return the sort key for people: the name before the hash part."""
    return path.name, path


def closure_size(store: Store, path: StorePath) -> Closure:
    """Return the size of the closure of a valid path, up to a limit."""
    [(count, sizes, size)] = _of_closure(store, "count(*), count(narSize), sum(narSize)", [path], _CLOSURE_MAX_PATHS)
    return Closure(count, size or 0, complete=count < _CLOSURE_MAX_PATHS and count == sizes)


def closure_paths(store: Store, paths: Iterable[StorePath]) -> list[StorePath]:
    """Return the valid ones of `paths`, and all paths that they refer to, directly or indirectly.

    Raises FormatError if one of these is malformed in the database.
    """
    rows = _of_closure(store, "substr(cast(path as text), ?)", paths, _NO_LIMIT, len(store.store_dir) + 2)
    return [StorePath(name) for (name,) in rows]


def closure_hash_parts(store: Store, paths: Iterable[StorePath], limit: int) -> frozenset[str]:
    """Return the hash parts of the valid ones of `paths` and of all paths that they refer to, at most `limit`."""
    start = len(store.store_dir) + 2
    rows = _of_closure(store, "substr(path, ?, ?)", paths, limit, start, HASH_PART_LENGTH)
    return frozenset(hash_part for (hash_part,) in rows)


def closure_rows(store: Store, path: StorePath, limit: int) -> list[tuple[int, str, str, int | None]]:
    """Return number, base name, hash and NAR size of at most `limit` paths in the closure of a valid path."""
    columns = "id, substr(cast(path as text), ?), cast(hash as text), cast(narSize as integer)"
    return _of_closure(store, columns, [path], limit, len(store.store_dir) + 2)


def closure_references(store: Store, path: StorePath, limit: int) -> list[tuple[int, int]]:
    """Return the numbers of referrer and reference for each reference in a closure of at most `limit` paths."""
    return store.database.query(_REFERENCES_IN_CLOSURE, f"{store.store_dir}/{path}", limit)


def _of_closure(
    store: Store, columns: str, paths: Iterable[StorePath], limit: int, *parameters: object
) -> list[tuple[Any, ...]]:
    """Return the columns of at most `limit` paths in the closure of `paths`."""
    named = json.dumps([f"{store.store_dir}/{path}" for path in paths])
    return store.database.query(_OF_CLOSURE.format(columns), named, limit, *parameters)


def _literally(word: str) -> str:
    return "".join(f"\\{letter}" if letter in "\\%_" else letter for letter in word)


def _store_path(base_name: str) -> StorePath | None:
    try:
        return StorePath(base_name)
    except FormatError:
        return None


def nar_hashes(store: Store) -> Iterator[tuple[StorePath, bytes]]:
    """Yield all valid paths with their NAR hashes, without those whose rows are malformed."""
    for path, nar_hash in store.database.query(_NAR_HASHES):
        algorithm, _, digest = nar_hash.partition(":")
        with suppress(FormatError, ValueError):
            if algorithm == "sha256":
                yield StorePath.in_dir(store.store_dir, path), bytes.fromhex(digest)

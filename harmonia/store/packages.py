"""Packages of a closure, and the differences between two closures, from the database alone."""

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from harmonia.nix.package_name import PackageName
from harmonia.nix.store_path import StorePath
from harmonia.store import queries
from harmonia.store.store import Store

MAX_PATHS = 50_000
"""Paths of a closure that are read; others are left out."""


class Member(NamedTuple):
    """A path of a closure."""

    number: int
    """The row's number, which other members' references name."""
    path: StorePath
    nar_hash: str
    """As in the database: `sha256:` and hexadecimal digits."""
    nar_size: int
    """In bytes; 0 if it is unknown."""


class Change(NamedTuple):
    """The difference of one package between two closures."""

    name: str
    before: tuple[str, ...]
    """Versions, sorted; "" for a path without a version. Empty if the package was added."""
    after: tuple[str, ...]
    """Likewise. Empty if the package was removed."""
    size: int
    """Difference of the sums of NAR sizes in bytes."""


def members(store: Store, path: StorePath, published: queries.PublishFilter = None) -> list[Member]:
    """Return the paths of the closure of a valid path, at most MAX_PATHS, sorted by name.

    With `published`, only paths for which it is true.
    """
    rows = queries.closure_rows(store, path, MAX_PATHS)
    found = (Member(number, StorePath(name), nar_hash, max(size or 0, 0)) for number, name, nar_hash, size in rows)
    return sorted(
        (member for member in found if published is None or published(member.path)),
        key=lambda member: queries.by_name(member.path),
    )


def changes(before: Iterable[Member], after: Iterable[Member]) -> list[Change]:
    """Return the packages whose versions or sizes differ, sorted by name."""
    old, new = _by_package(before), _by_package(after)
    result = []
    for name in sorted(old.keys() | new.keys()):
        had, has = old.get(name, []), new.get(name, [])
        change = Change(name, _versions(had), _versions(has), _size(has) - _size(had))
        if change.before != change.after or change.size:
            result.append(change)
    return result


def _by_package(members: Iterable[Member]) -> dict[str, list[Member]]:
    packages: defaultdict[str, list[Member]] = defaultdict(list)
    for member in members:
        packages[PackageName.parse(member.path.name).name].append(member)
    return packages


def _versions(members: Iterable[Member]) -> tuple[str, ...]:
    return tuple(sorted({PackageName.parse(member.path.name).version for member in members}))


def _size(members: Iterable[Member]) -> int:
    return sum(member.nar_size for member in members)

"""Cache of lookups in upstreams, in memory: which paths an upstream has, and which none has."""

from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

from cachetools import TLRUCache

from harmonia.upstream.loop_guard import Via
from harmonia.upstream.remote_path import RemotePath, memory_bytes

if TYPE_CHECKING:
    from collections.abc import MutableMapping

POSITIVE_TTL_S = 3600.0  # a narinfo stays true, unless a signature is withdrawn
NEGATIVE_TTL_S = 30.0  # long enough for a client that asks twice, short for a client that waits for a build
_LOOKUPS_MAX_BYTES = 32 << 20  # about: some 20,000 paths, or 60,000 misses

LookupKey = tuple[str, Via]
"""A hash part, and the Via of the request for it."""


@dataclass(frozen=True, slots=True)
class CachedLookup:
    """The result of a lookup."""

    path: RemotePath | None
    size: int
    """Approximate bytes of memory."""


class LookupCache:
    """Lookups in at most _LOOKUPS_MAX_BYTES of memory. The least recently used one is evicted first."""

    def __init__(self) -> None:
        self._entries: MutableMapping[LookupKey, CachedLookup] = TLRUCache(
            _LOOKUPS_MAX_BYTES, _expires_at, getsizeof=attrgetter("size")
        )

    def get(self, key: LookupKey) -> CachedLookup | None:
        return self._entries.get(key)

    def remember(self, key: LookupKey, path: RemotePath | None) -> None:
        """Remember the path of a lookup, or that no upstream has it."""
        of_path = memory_bytes(path.narinfo_size) if path else 0
        size = 500 + 100 * (len(key[1].through) + len(key[1].asked)) + of_path
        self._entries[key] = CachedLookup(path, size)

    def forget(self, key: LookupKey) -> None:
        self._entries.pop(key, None)


def _expires_at(_: LookupKey, lookup: CachedLookup, now: float) -> float:
    return now + (POSITIVE_TTL_S if lookup.path else NEGATIVE_TTL_S)

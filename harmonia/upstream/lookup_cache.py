"""Lookup cache: LRU of paths that upstreams have or lack, each with a TTL."""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass

from harmonia.upstream.loop_guard import Via
from harmonia.upstream.remote_path import RemotePath

POSITIVE_TTL_S = 3600.0  # seconds: as long as no signature is withdrawn, what is said of a path stays true
_NEGATIVE_TTL_S = 30.0  # seconds: long enough for a client that asks twice, short for one who waits for a build
_MAX_BYTES = 32 << 20  # bytes, about: some 20,000 paths, or 60,000 that nobody has

LookupKey = tuple[str, Via]
"""A hash part, and the way by which the key for it came."""


@dataclass(frozen=True, slots=True)
class CachedLookup:
    found: RemotePath | None
    expires: float
    size: int
    """Bytes of memory, about."""


class LookupCache:
    """Bounded: what was used longest ago goes first."""

    def __init__(self) -> None:
        self._left = _MAX_BYTES
        self._entries: OrderedDict[LookupKey, CachedLookup] = OrderedDict()

    def get(self, key: LookupKey) -> CachedLookup | None:
        answer = self._entries.get(key)
        if answer is None or answer.expires < asyncio.get_running_loop().time():
            return None
        self._entries.move_to_end(key)
        return answer

    def remember(self, key: LookupKey, found: RemotePath | None) -> None:
        self.forget(key)
        ttl = POSITIVE_TTL_S if found else _NEGATIVE_TTL_S
        # Objects in Python take more than the text that they were made of.
        size = 500 + 100 * (len(key[1].through) + len(key[1].asked)) + (1000 + 3 * found.narinfo_size if found else 0)
        self._entries[key] = CachedLookup(found, asyncio.get_running_loop().time() + ttl, size)
        self._left -= size
        while self._left < 0:
            self.forget(next(iter(self._entries)))

    def forget(self, key: LookupKey) -> None:
        answer = self._entries.pop(key, None)
        self._left += answer.size if answer else 0

"""Recently failed NARs of upstreams. Their narinfos are answered with 404, so that clients ask other caches.

All workers share a hash table in memory, which is created before the fork: a client may request the narinfo from one
worker and the NAR from another.
"""

import hashlib
import mmap
import struct
import time

TTL_S = 30.0
_SLOTS = 4096  # a NAR with the same slot as another one replaces it; the replaced NAR is requested again
_SLOT = struct.Struct("<24sd")


class FailedNars:
    def __init__(self) -> None:
        self._table = mmap.mmap(-1, _SLOTS * _SLOT.size)

    def add(self, upstream: str, key: str) -> None:
        """Remember for TTL_S that this upstream does not have the NAR with this key."""
        digest, place = _place(upstream, key)
        _SLOT.pack_into(self._table, place, digest, time.monotonic() + TTL_S)

    def remove(self, upstream: str, key: str) -> None:
        if self.has(upstream, key):
            _SLOT.pack_into(self._table, _place(upstream, key)[1], b"", 0)

    def has(self, upstream: str, key: str) -> bool:
        digest, place = _place(upstream, key)
        stored_digest, until = _SLOT.unpack_from(self._table, place)
        return bool(stored_digest == digest and time.monotonic() < until)


def _place(upstream: str, key: str) -> tuple[bytes, int]:
    digest = hashlib.sha256(f"{upstream} {key}".encode()).digest()
    return digest[:24], int.from_bytes(digest[24:28], "little") % _SLOTS * _SLOT.size

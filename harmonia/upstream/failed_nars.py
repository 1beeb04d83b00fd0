"""Which NARs of upstreams could not be had a moment ago: their narinfos are 404, so that clients ask other caches.

All workers share a table in memory, made before the fork: a client asks one for the narinfo and another for the NAR.
"""

import hashlib
import mmap
import struct
import time

TTL_S = 30.0
_SLOTS = 4096  # another NAR that comes to the same one takes it over, and the first is tried anew
_SLOT = struct.Struct("<24sd")


class FailedNars:
    def __init__(self) -> None:
        self._table = mmap.mmap(-1, _SLOTS * _SLOT.size)

    def add(self, upstream: str, key: str) -> None:
        """Remember that this upstream does not have the NAR of that key."""
        digest, place = _place(upstream, key)
        _SLOT.pack_into(self._table, place, digest, time.monotonic() + TTL_S)

    def remove(self, upstream: str, key: str) -> None:
        if self.has(upstream, key):
            _SLOT.pack_into(self._table, _place(upstream, key)[1], b"", 0)

    def has(self, upstream: str, key: str) -> bool:
        digest, place = _place(upstream, key)
        found, until = _SLOT.unpack_from(self._table, place)
        return bool(found == digest and time.monotonic() < until)


def _place(upstream: str, key: str) -> tuple[bytes, int]:
    digest = hashlib.sha256(f"{upstream} {key}".encode()).digest()
    return digest[:24], int.from_bytes(digest[24:28], "little") % _SLOTS * _SLOT.size

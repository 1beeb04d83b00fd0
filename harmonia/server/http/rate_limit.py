"""How often something may happen, for each of many clients, in memory that is bounded."""

import ipaddress
import time
from collections.abc import Callable, MutableMapping

from cachetools import LRUCache

_MINUTE_S = 60.0
_MAX_CLIENTS = 4096  # clients; some 200 bytes each
_V6_PREFIX_BITS = 64  # bits: who has one address has all that begin like it (RFC 6177)


class Rate:
    """At most so many times a minute for each client, all at once or spread over it (a leaky bucket; ITU-T I.371).

    Only the clients that came last are remembered. Who comes from thousands of addresses gets that many times the rate.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`per_minute` is more than 0."""
        self._interval = _MINUTE_S / per_minute
        self._clock = clock
        self._empty_at: MutableMapping[str, float] = LRUCache(_MAX_CLIENTS)

    def wait(self, client: str) -> float:
        """0 where it may happen now, which is counted; else the seconds until it may, and nothing is counted."""
        client = network(client)
        now = self._clock()
        empty_at = max(self._empty_at.get(client, now), now) + self._interval
        wait = empty_at - now - _MINUTE_S
        # Sums of fractions: less than a hundredth of an interval too late is in time.
        allowed = wait < self._interval / 100
        self._empty_at[client] = empty_at if allowed else empty_at - self._interval
        return 0.0 if allowed else wait


def network(client: str) -> str:
    """Whom an address stands for; what is none, for itself."""
    if ":" not in client:
        return client
    return str(ipaddress.IPv6Network((client, _V6_PREFIX_BITS), strict=False))

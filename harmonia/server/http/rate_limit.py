"""Rate limit for each client, in bounded memory."""

import ipaddress
import time
from collections.abc import Callable, MutableMapping

from cachetools import LRUCache

_MINUTE_S = 60.0
_MAX_CLIENTS = 4096  # some 200 bytes each
_V6_PREFIX_BITS = 64  # one site has all addresses of such a network (RFC 6177)


class Rate:
    """Leaky bucket for each client (ITU-T I.371): so many events a minute, all at once or spread over the minute.

    Only the most recent 4096 clients are remembered. An attacker with thousands of addresses gets as many times the
    rate.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Create a rate limit. `per_minute` must be more than 0."""
        self._interval = _MINUTE_S / per_minute
        self._clock = clock
        self._empty_at: MutableMapping[str, float] = LRUCache(_MAX_CLIENTS)

    def wait(self, client: str, events: int = 1) -> float:
        """Return 0 and count the events if they are allowed now. Otherwise, return the seconds until they are allowed.

        More events than the limit of a minute are never allowed.
        """
        client = network(client)
        now = self._clock()
        empty_at = max(self._empty_at.get(client, now), now) + events * self._interval
        wait = empty_at - now - _MINUTE_S
        # Rounding errors add up: an excess of less than a hundredth of an interval is allowed.
        allowed = wait < self._interval / 100
        self._empty_at[client] = empty_at if allowed else empty_at - events * self._interval
        return 0.0 if allowed else wait


def network(client: str) -> str:
    """Return the network of an IPv6 address, or any other text as it is."""
    if ":" not in client:
        return client
    return str(ipaddress.IPv6Network((client, _V6_PREFIX_BITS), strict=False))

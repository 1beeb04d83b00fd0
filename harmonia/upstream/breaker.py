"""Circuit breaker: after repeated failures, requests to an upstream stop until it answers a probe."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

MAX_FAILURES = 3  # in a row, until the circuit opens: one or two failures are normal in a network
FIRST_DELAY, LONGEST_DELAY = 0.5, 60.0  # seconds until the next probe; the delay doubles with each probe

_log = logging.getLogger("harmonia")


class Breaker:
    """Circuit breaker of one upstream, on one event loop. Closed: requests are sent. Open: only probes are."""

    def __init__(self, probe: Callable[[], Awaitable[bool]], changed: Callable[[str | None], None]) -> None:
        """Create a breaker, which `start` starts.

        `probe` returns whether the upstream works. It runs in the background, first at `start`; `usable` waits for the
        first result. `changed` is called with the cause when the breaker opens, and with None when it closes.
        """
        self.closed = False
        self._probe = probe
        self._changed = changed
        self._failures = 0
        self._delay = FIRST_DELAY
        self._retry_after = 0.0
        self._probed = asyncio.Event()
        self._probing: asyncio.Task[None] | None = None

    def start(self, patience: float) -> None:
        """Begin to probe. `usable` waits for the first result for at most `patience` seconds."""
        self._probing = asyncio.create_task(self._probe_until_closed(0))
        asyncio.get_running_loop().call_later(patience, self._probed.set)

    async def stop(self) -> None:
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.gather(self._probing, return_exceptions=True)

    async def usable(self) -> bool:
        """Return True if the breaker is closed. Wait for the first probe, at most for `patience` of `start`."""
        await self._probed.wait()
        return self.closed

    def succeeded(self) -> None:
        self._failures = 0
        self._delay = FIRST_DELAY

    def failed(self, why: str, retry_after: float = 0) -> None:
        """Count a failure with its cause. The breaker opens after MAX_FAILURES, or at once with `retry_after`.

        The next probe comes after at least `retry_after` seconds, or LONGEST_DELAY if that is less.
        """
        self._failures += 1
        self._retry_after = min(max(retry_after, self._retry_after), LONGEST_DELAY)
        if self.closed and (self._failures >= MAX_FAILURES or retry_after):
            self.closed = False
            self._changed(why)
            self._probing = asyncio.create_task(self._probe_until_closed(self._pause()))

    def _pause(self) -> float:
        # Only a real request that succeeds resets the delay: a probe that succeeds does not prove that requests will.
        delay, self._delay = self._delay, min(2 * self._delay, LONGEST_DELAY)
        pause, self._retry_after = max(delay * random.uniform(0.75, 1.25), self._retry_after), 0.0  # noqa: S311 (not a secret)
        return pause

    async def _works(self) -> bool:
        try:
            return await self._probe()
        except Exception:  # noqa: BLE001 (a bug of ours must not end the loop of probes)
            _log.exception("cannot probe an upstream")
            return False

    async def _probe_until_closed(self, pause: float) -> None:
        await asyncio.sleep(pause)
        while not await self._works():
            self._probed.set()
            await asyncio.sleep(self._pause())
        self.closed = True
        self._failures = 0
        self._changed(None)
        self._probed.set()

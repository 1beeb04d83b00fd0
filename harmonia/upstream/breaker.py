"""A circuit breaker: an upstream that fails again and again is not asked, until it answers a probe."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

MAX_FAILURES = 3  # in a row, after which it is not asked: one or two are the network's everyday
FIRST_DELAY, LONGEST_DELAY = 0.5, 60.0  # seconds until the next probe; it doubles with each

_log = logging.getLogger("harmonia")


class Breaker:
    """Closed while the upstream is asked. Everything happens on one event loop.

    `probe` tells whether the upstream works; it is called in the background, first at the `start`. Until that first
    call is over, nobody knows, and `usable` waits. `changed` is told why the upstream is left alone, or None when it is
    asked again.
    """

    def __init__(self, probe: Callable[[], Awaitable[bool]], changed: Callable[[str | None], None]) -> None:
        self.closed = False
        self._probe = probe
        self._changed = changed
        self._failures = 0
        self._delay = FIRST_DELAY
        self._retry_after = 0.0
        self._probed = asyncio.Event()
        self._probing: asyncio.Task[None] | None = None

    def start(self, patience: float) -> None:
        """Begin to probe. After `patience` seconds nobody waits any longer for what comes of it."""
        self._probing = asyncio.create_task(self._probe_until_closed(0))
        asyncio.get_running_loop().call_later(patience, self._probed.set)

    async def stop(self) -> None:
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.gather(self._probing, return_exceptions=True)

    async def usable(self) -> bool:
        await self._probed.wait()
        return self.closed

    def succeeded(self) -> None:
        self._failures = 0
        self._delay = FIRST_DELAY

    def failed(self, why: str, retry_after: float = 0) -> None:
        """It failed once more, and perhaps asked to be left alone for some seconds."""
        self._failures += 1
        self._retry_after = min(max(retry_after, self._retry_after), LONGEST_DELAY)
        if self.closed and (self._failures >= MAX_FAILURES or retry_after):
            self.closed = False
            self._changed(why)
            self._probing = asyncio.create_task(self._probe_until_closed(self._pause()))

    def _pause(self) -> float:
        # It starts over only when a real question was answered: a probe that is, is no proof that those will be.
        delay, self._delay = self._delay, min(2 * self._delay, LONGEST_DELAY)
        pause, self._retry_after = max(delay * random.uniform(0.75, 1.25), self._retry_after), 0.0  # noqa: S311 (no secret)
        return pause

    async def _works(self) -> bool:
        try:
            return await self._probe()
        except Exception:  # noqa: BLE001 (a fault of ours ends no more than this probe: nobody else would probe again)
            _log.exception("an upstream cannot be probed")
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

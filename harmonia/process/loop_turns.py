"""Limit of the pieces that all bodies together send in one iteration of the event loop.

An iteration reads from and writes to every connection that is ready. Without the limit, an iteration takes longer the
more downloads run, and every small response waits for it: 30 ms with 16 clients that read as fast as they can.
"""

import asyncio
from collections import deque

PIECES_PER_ITERATION = 4
"""Some 3 ms with pieces of 256 KiB from an upstream. Fewer would not make small responses faster."""


class LoopTurns:
    """The turns of one event loop, first come, first served. A body that sends alone needs none."""

    def __init__(self) -> None:
        self._last: int | None = None
        self._left = PIECES_PER_ITERATION
        self._renews = False
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def take(self, body: int) -> None:
        """Wait until the body with this number may send one more piece."""
        if body == self._last:
            return
        self._last = body
        loop = asyncio.get_running_loop()
        if not self._renews:
            self._renews = True
            loop.call_soon(self._renew, loop)
        if self._left:
            self._left -= 1
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _renew(self, loop: asyncio.AbstractEventLoop) -> None:
        self._left = PIECES_PER_ITERATION
        while self._waiting and self._left:
            turn = self._waiting.popleft()
            if not turn.done():  # cancelled
                turn.set_result(None)
                self._left -= 1
        self._renews = bool(self._waiting)
        if self._renews:
            loop.call_soon(self._renew, loop)

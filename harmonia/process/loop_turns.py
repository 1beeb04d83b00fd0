"""Limit of the work that one iteration of the event loop does for requests, shared fairly between clients.

An iteration handles every connection that is ready. Without a limit, an iteration takes longer the more requests
and downloads run, and each small response waits for several iterations: 30 ms each with 16 clients that read as fast as
they can.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable

TURNS_PER_ITERATION = 4
"""Some 3 ms with pieces of 256 KiB from an upstream. Fewer would not make small responses faster."""


class LoopTurns:
    """The turns of one event loop: the start of a request, or a further piece of a body. Clients take turns."""

    def __init__(self) -> None:
        self._last: int | None = None
        self._left = TURNS_PER_ITERATION
        self._renews = False
        self._waiting: OrderedDict[Hashable, deque[asyncio.Future[None]]] = OrderedDict()

    async def start(self, client: Callable[[], Hashable]) -> None:
        """Wait until a request may start. `client` returns its client; it is called only if the request must wait."""
        if not self._take():
            await self._wait(client())

    async def send(self, body: int, client: Callable[[], Hashable]) -> None:
        """Wait until a body may send one more piece. The body that was the last to send does not wait.

        `body` is a number that identifies the body. `client` is called as in `start`.
        """
        if body != self._last:
            self._last = body
            await self.start(client)

    def _take(self) -> bool:
        """Take a turn, and return True, if one is left."""
        if not self._renews:
            self._renews = True
            asyncio.get_running_loop().call_soon(self._renew)
        if not self._left:
            return False
        self._left -= 1
        return True

    async def _wait(self, client: Hashable) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        await turn

    def _renew(self) -> None:
        self._left = TURNS_PER_ITERATION
        while self._waiting and self._left:
            client, turns = next(iter(self._waiting.items()))
            turn = turns.popleft()
            if turns:
                self._waiting.move_to_end(client)
            else:
                del self._waiting[client]
            if not turn.done():  # cancelled
                turn.set_result(None)
                self._left -= 1
        self._renews = bool(self._waiting)
        if self._renews:
            asyncio.get_running_loop().call_soon(self._renew)

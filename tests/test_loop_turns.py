"""Pieces of all bodies share a number of turns in each iteration of the event loop."""

import asyncio
import contextlib
from collections import Counter

import pytest

from harmonia.process.loop_turns import PIECES_PER_ITERATION, LoopTurns

BODIES = 50
PIECES = 20


def test_an_iteration_has_a_bounded_number_of_turns_and_all_bodies_get_theirs() -> None:
    iteration = 0
    taken: Counter[int] = Counter()

    async def send(turns: LoopTurns, body: int) -> None:
        for _ in range(PIECES):
            await turns.take(body)
            taken[iteration] += 1
            await asyncio.sleep(0)  # as it takes to read the next piece

    async def check() -> None:
        nonlocal iteration
        turns = LoopTurns()
        bodies = asyncio.gather(*(send(turns, body) for body in range(BODIES)))
        while not bodies.done():
            await asyncio.sleep(0)
            iteration += 1
        await bodies

    asyncio.run(check())
    assert taken.total() == BODIES * PIECES
    # A turn that was given at the end of one iteration is used in the next, beside those of that one.
    assert max(taken.values()) <= 2 * PIECES_PER_ITERATION


def test_turns_are_first_come_first_served() -> None:
    order: list[int] = []

    async def send(turns: LoopTurns, body: int) -> None:
        await turns.take(body)
        order.append(body)

    async def check() -> None:
        turns = LoopTurns()
        await asyncio.gather(*(send(turns, body) for body in range(BODIES)))

    asyncio.run(check())
    assert order == list(range(BODIES))


def test_a_cancelled_body_takes_no_turn() -> None:
    async def check() -> None:
        turns = LoopTurns()
        bodies = [asyncio.create_task(turns.take(body)) for body in range(2 * PIECES_PER_ITERATION + 1)]
        await asyncio.sleep(0)
        for body in bodies[PIECES_PER_ITERATION:-1]:
            body.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert bodies[-1].done()

    asyncio.run(check())


def test_a_body_that_sends_alone_does_not_wait() -> None:
    async def check() -> None:
        turns = LoopTurns()
        for _ in range(PIECES * PIECES_PER_ITERATION):
            with contextlib.closing(turns.take(1)) as taking, pytest.raises(StopIteration):
                taking.send(None)

    asyncio.run(check())

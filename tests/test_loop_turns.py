"""Requests and pieces of bodies share a number of turns in each iteration of the event loop."""

import asyncio
import contextlib
from collections import Counter

import pytest

from harmonia.process.loop_turns import TURNS_PER_ITERATION, LoopTurns

BODIES = 50
PIECES = 20


def client() -> str:
    return "192.0.2.1"


def test_number_of_turns_in_an_iteration_is_bounded_and_all_bodies_finish() -> None:
    iteration = 0
    taken: Counter[int] = Counter()

    async def send(turns: LoopTurns, body: int) -> None:
        for _ in range(PIECES):
            await turns.send(body, client)
            taken[iteration] += 1
            await asyncio.sleep(0)  # stands for reading the next piece

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
    # A turn granted at the end of one iteration is used in the next, in addition to the turns of that iteration.
    assert max(taken.values()) <= 2 * TURNS_PER_ITERATION


def test_turns_of_a_client_are_first_come_first_served() -> None:
    order: list[int] = []

    async def ask(turns: LoopTurns, number: int) -> None:
        await turns.start(client)
        order.append(number)

    async def check() -> None:
        turns = LoopTurns()
        await asyncio.gather(*(ask(turns, number) for number in range(BODIES)))

    asyncio.run(check())
    assert order == list(range(BODIES))


def test_request_starts_before_most_requests_of_a_busier_client() -> None:
    started: list[str] = []

    async def ask(turns: LoopTurns, name: str) -> None:
        await turns.start(lambda: name)
        started.append(name)

    async def check() -> None:
        turns = LoopTurns()
        await asyncio.gather(*(ask(turns, name) for name in ["busy"] * BODIES + ["other"]))

    asyncio.run(check())
    assert started.index("other") <= 2 * TURNS_PER_ITERATION


def test_cancelled_request_takes_no_turn() -> None:
    async def check() -> None:
        turns = LoopTurns()
        requests = [asyncio.create_task(turns.start(client)) for _ in range(2 * TURNS_PER_ITERATION + 1)]
        await asyncio.sleep(0)
        for request in requests[TURNS_PER_ITERATION:-1]:
            request.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert requests[-1].done()

    asyncio.run(check())


def test_only_body_does_not_wait() -> None:
    async def check() -> None:
        turns = LoopTurns()
        for _ in range(PIECES * TURNS_PER_ITERATION):
            with contextlib.closing(turns.send(1, client)) as taking, pytest.raises(StopIteration):
                taking.send(None)

    asyncio.run(check())

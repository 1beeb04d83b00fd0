"""Rate limits: each client has its own, no minute exceeds it by much, and memory is bounded."""

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmonia.server.http.rate_limit import Rate


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("per_minute", [1, 3, 7, 120])
def test_one_minute_of_requests_is_allowed_at_once(per_minute: int) -> None:
    clock = Clock()
    rate = Rate(per_minute, clock)
    assert [rate.wait("a") for _ in range(per_minute)] == [0] * per_minute
    assert rate.wait("a") == pytest.approx(60 / per_minute)
    assert rate.wait("a") == pytest.approx(60 / per_minute)  # a refused request is not counted
    assert rate.wait("b") == 0
    clock.now += 60 / per_minute
    assert rate.wait("a") == 0
    assert rate.wait("a") > 0
    clock.now += 60
    assert [rate.wait("a") for _ in range(per_minute)] == [0] * per_minute


def test_several_events_count_as_so_many_single_ones_or_not_at_all() -> None:
    clock = Clock()
    rate = Rate(10, clock)
    assert rate.wait("a", 11) > 0
    assert rate.wait("a", 7) == 0
    assert rate.wait("a", 4) == pytest.approx(6)
    assert [rate.wait("a") for _ in range(3)] == [0, 0, 0]
    assert rate.wait("a") > 0


@given(st.integers(1, 20), st.lists(st.floats(0, 30)))
def test_no_minute_exceeds_twice_the_rate_and_waiting_always_suffices(per_minute: int, pauses: list[float]) -> None:
    clock = Clock()
    rate = Rate(per_minute, clock)
    allowed = []
    for pause in pauses:
        clock.now += pause
        wait = rate.wait("a")
        if wait == 0:
            allowed.append(clock.now)
        else:
            before = clock.now
            clock.now += wait
            assert rate.wait("a") == 0
            allowed.append(clock.now)
            assert clock.now > before
    for begin in allowed:
        assert sum(begin <= when < begin + 60 for when in allowed) <= 2 * per_minute


def test_ipv6_network_is_one_client() -> None:
    rate = Rate(1, Clock())
    assert rate.wait("2001:db8:1:2::1") == 0
    assert rate.wait("2001:db8:1:2:ffff::9") > 0
    assert rate.wait("2001:db8:1:3::1") == 0
    assert rate.wait("192.0.2.1") == 0
    assert rate.wait("192.0.2.2") == 0
    assert rate.wait("unix") == 0


def test_memory_is_bounded() -> None:
    rate = Rate(10, Clock())
    tracemalloc.start()
    for number in range(100_000):
        rate.wait(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < 2 << 20

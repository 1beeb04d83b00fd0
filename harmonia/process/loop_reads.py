"""Short reads on the event loop, as long as they come from memory: a thread would take longer to wake than to read.

A read that waits for the disk blocks the loop. After one, the next reads go to threads for fifty times as long, at most
for a second.
"""

from collections.abc import Callable, Generator
from resource import RUSAGE_THREAD, getrusage, struct_rusage
from time import monotonic, perf_counter
from typing import TypeVar, cast

_SLOW_DISK_S = 0.002  # from which on a read from the disk counts as a wait
_SLOW_S = 0.02  # from which on any other read does; unless the thread had to wait for a processor
_PAUSE_FACTOR = 50  # after a wait, until the next read: the loop waits for at most a fiftieth of the time
_MAX_PAUSE_S = 1.0
_STEPS_S = 0.001  # for which a generator runs before other tasks do

_T = TypeVar("_T")


class LoopReads:
    """Reads of one kind, or short writes. `observe` gets the seconds of each."""

    def __init__(self, observe: Callable[[float], None] = lambda _: None, max_pause_s: float = _MAX_PAUSE_S) -> None:
        self._observe = observe
        self._max_pause_s = max_pause_s
        self._resumes = 0.0

    @property
    def allowed(self) -> bool:
        """True if the next read may run on the event loop."""
        return monotonic() >= self._resumes

    def run(self, read: Callable[[], _T]) -> _T:
        """Run a read, and return its result."""
        began, before = monotonic(), getrusage(RUSAGE_THREAD)
        try:
            return read()
        finally:
            seconds = monotonic() - began
            self._observe(seconds)
            if seconds > _SLOW_DISK_S and _has_waited(seconds, before, getrusage(RUSAGE_THREAD)):
                self._resumes = monotonic() + min(_PAUSE_FACTOR * seconds, self._max_pause_s)


def advance(steps: Generator[None, None, _T]) -> tuple[_T] | None:
    """Run a generator for a millisecond. Return its result if it has ended, otherwise None."""
    until = perf_counter() + _STEPS_S
    try:
        while perf_counter() < until:
            next(steps)
    except StopIteration as ended:
        return (ended.value,)
    return None


def finish(steps: Generator[None, None, _T]) -> _T:
    """Run a generator to its end, and return its result."""
    while True:
        try:
            next(steps)
        except StopIteration as ended:
            return cast("_T", ended.value)


def _has_waited(seconds: float, before: struct_rusage, after: struct_rusage) -> bool:
    """Return True if a read of `seconds` waited for something else than a processor."""
    from_disk = after.ru_inblock > before.ru_inblock
    was_preempted = after.ru_nivcsw > before.ru_nivcsw
    return from_disk or (seconds > _SLOW_S and not was_preempted)

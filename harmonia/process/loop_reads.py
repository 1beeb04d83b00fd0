"""Short reads on the event loop, as long as they come from memory: a thread would take longer to wake than to read.

A read that waits for the disk blocks the loop. After one, or after an error, the next reads go to a thread, so there is
at most one such wait in each second.
"""

from collections.abc import Callable
from resource import RUSAGE_THREAD, getrusage
from time import monotonic
from typing import TypeVar

_SLOW_DISK_S = 0.002  # from which on a read from the disk counts as a wait
_SLOW_S = 0.02  # from which on any other read does; a busy machine delays some by several milliseconds
_PAUSE_S = 1.0

_T = TypeVar("_T")


class LoopReads:
    """Reads of one kind. `observe` gets the seconds of each."""

    def __init__(self, observe: Callable[[float], None] = lambda _: None) -> None:
        self._observe = observe
        self._resumes = 0.0

    @property
    def allowed(self) -> bool:
        """True if the next read may run on the event loop."""
        return monotonic() >= self._resumes

    def run(self, read: Callable[[], _T]) -> _T:
        """Run a read, and return its result."""
        began, blocks = monotonic(), _disk_reads()
        longest = 0.0
        try:
            result = read()
            longest = _SLOW_S if _disk_reads() == blocks else _SLOW_DISK_S
            return result
        finally:
            ended = monotonic()
            self._observe(ended - began)
            if ended - began > longest:
                self._resumes = ended + _PAUSE_S


def _disk_reads() -> int:
    """Return the number of blocks that the kernel has read from a disk for this thread."""
    return getrusage(RUSAGE_THREAD).ru_inblock

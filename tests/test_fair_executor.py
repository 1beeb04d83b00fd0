"""Promises of the pool that clients share."""

import gc
from weakref import ref

from harmonia.process.fair_executor import FairExecutor


class _Thing:
    """Something that a job works on."""


def test_an_error_keeps_nothing_once_it_is_dealt_with() -> None:
    """Not until a garbage collection, which may be long in coming."""
    pool = FairExecutor(1, 1, "test")

    def fail(_: _Thing) -> None:
        raise ValueError

    thing = _Thing()
    kept = ref(thing)
    gc.disable()
    try:
        future = pool.submit("client", fail, thing)
        del thing
        assert isinstance(future.exception(), ValueError)
        pool.submit("client", int).result()  # by now the thread has let go of the first job
        del future
        assert kept() is None
    finally:
        gc.enable()

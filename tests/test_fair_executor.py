"""The thread pool that all clients share."""

import gc
from weakref import ref

from harmonia.process.fair_executor import FairExecutor


class _Thing:
    """An argument of a job."""


def test_failed_job_releases_its_arguments_without_garbage_collection() -> None:
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
        pool.submit("client", int).result()  # now the thread has dropped the first job
        del future
        assert kept() is None
    finally:
        gc.enable()

"""The thread pool that all clients share."""

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from unittest.mock import patch
from weakref import ref

from harmonia.process.fair_executor import FairExecutor, start_threads


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


@contextmanager
def threads_that_can_start(most: int) -> Iterator[None]:
    start, left = threading.Thread.start, [most]

    def start_or_fail(thread: threading.Thread) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("can't start new thread")
        start(thread)

    with patch("threading.Thread.start", start_or_fail):
        yield


def runs_together(pool: ThreadPoolExecutor, threads: int) -> bool:
    """Return True if the pool runs this many jobs at a time."""
    barrier = threading.Barrier(threads)
    jobs: list[Callable[[], int]] = [pool.submit(barrier.wait, 20).result for _ in range(threads)]
    return sorted(job() for job in jobs) == list(range(threads))


def test_started_threads_run_jobs_without_the_start_of_another_thread() -> None:
    with ThreadPoolExecutor(3) as pool:
        start_threads(pool, 3)
        with threads_that_can_start(0):
            assert runs_together(pool, 3)


def test_pool_whose_threads_cannot_all_start_runs_jobs() -> None:
    with ThreadPoolExecutor(3) as pool:
        with threads_that_can_start(2):
            start_threads(pool, 3)
        assert runs_together(pool, 3)

"""Thread pool with a limit of threads for each client, so that no client can block the others."""

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

_T = TypeVar("_T")
_P = ParamSpec("_P")
_Job = Callable[[], None]


class FairExecutor:
    """A pool that runs at most `threads` jobs at a time, at most `share` of them for one client. Clients take turns."""

    def __init__(self, threads: int, share: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._threads = threads
        self._share = share
        self._lock = threading.Lock()
        self._waiting: OrderedDict[Hashable, deque[_Job]] = OrderedDict()
        self._running: Counter[Hashable] = Counter()
        self._busy = 0

    def start(self, threads: int) -> None:
        """Start some of the threads now."""
        start_threads(self._pool, threads)

    def submit(
        self, client: Hashable, function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs
    ) -> "Future[_T]":
        """Run a function in the pool when it is the client's turn, and return a future for its result.

        Raises RuntimeError if no thread can be started.
        """
        future: Future[_T] = Future()

        pending = [(future, partial(function, *arguments, **named))]

        def job() -> None:
            # The traceback of an error refers to this frame. The frame must not refer to the future or the call: this
            # would be a reference cycle, which keeps all of them in memory until a garbage collection.
            own, call = pending.pop()
            try:
                if own.set_running_or_notify_cancel():
                    own.set_result(call())
            except BaseException as error:  # noqa: BLE001 (the future's owner gets it)
                own.set_exception(error)
            finally:
                del own, call

        with self._lock:
            self._waiting.setdefault(client, deque()).append(job)
        self._start()
        return future

    def _start(self) -> None:
        """Start all jobs that may run now."""
        while (chosen := self._choose()) is not None:
            client, job = chosen
            try:
                self._pool.submit(self._run, client, job)
            except RuntimeError:
                self._end(client)
                raise

    def _choose(self) -> tuple[Hashable, _Job] | None:
        with self._lock:
            if self._busy == self._threads:
                return None
            for client, jobs in self._waiting.items():
                if self._running[client] < self._share:
                    job = jobs.popleft()
                    if jobs:
                        self._waiting.move_to_end(client)
                    else:
                        del self._waiting[client]
                    self._running[client] += 1
                    self._busy += 1
                    return client, job
        return None

    def _run(self, client: Hashable, job: _Job) -> None:
        try:
            job()
        finally:
            self._end(client)
            self._start()

    def _end(self, client: Hashable) -> None:
        with self._lock:
            self._busy -= 1
            self._running[client] -= 1
            if not self._running[client]:
                del self._running[client]


def start_threads(pool: ThreadPoolExecutor, threads: int) -> None:
    """Start the first threads of a pool, of which none has started yet, or as many as possible.

    Otherwise, `submit` starts a thread and waits until it runs: 0.1 s on the event loop if other threads are busy.
    """
    all_run = threading.Barrier(threads + 1)
    try:
        for _ in range(threads):
            pool.submit(all_run.wait)
        all_run.wait()
    except RuntimeError:  # no thread can be started; requests try again
        all_run.abort()

"""Thread pools: body reads of one client delay neither other clients nor short jobs, and cancelled jobs end quietly."""

import asyncio
import gc
import threading
from typing import Any, cast

from harmonia.errors import FormatError
from harmonia.process.threads import Threads
from support.running import PATIENCE_S


def test_bodies_of_one_client_leave_threads_for_others() -> None:
    threads = Threads(cast("Any", None), cast("Any", None))
    gate = threading.Event()
    try:
        for _ in range(100):
            threads.bodies.submit("one", gate.wait, 20)
        assert threads.bodies.submit("another", lambda: "read").result(PATIENCE_S) == "read"
        assert asyncio.run(threads.run_io(lambda: "asked")) == "asked"
    finally:
        gate.set()


def test_error_of_a_job_whose_caller_was_cancelled_is_not_logged() -> None:
    """For example, a server stops while it verifies a NAR: asyncio would log that nobody asked for the error."""
    threads = Threads(cast("Any", None), cast("Any", None))
    begun, gate = threading.Event(), threading.Event()
    logged: list[object] = []

    def verify() -> None:
        begun.set()
        gate.wait(PATIENCE_S)
        raise FormatError("the file is truncated")

    async def stop() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context))
        running = asyncio.create_task(threads.unpack(verify))
        await asyncio.to_thread(begun.wait, PATIENCE_S)
        running.cancel()
        await asyncio.sleep(0)  # now the caller waits for the job
        gate.set()
        await asyncio.wait({running})
        assert running.cancelled()
        del running
        gc.collect()

    asyncio.run(stop())
    assert logged == []

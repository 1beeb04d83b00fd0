"""Thread pools: body reads of one client delay neither other clients nor short jobs."""

import asyncio
import threading
from typing import Any, cast

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

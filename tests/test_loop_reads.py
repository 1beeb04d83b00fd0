"""Reads that wait block the event loop for a small part of the time."""

from types import SimpleNamespace

import pytest

from harmonia.process import loop_reads
from harmonia.process.loop_reads import LoopReads


@pytest.mark.parametrize(
    ("seconds", "disk_reads", "preemptions", "pause"),
    [
        (0.001, 1, 0, 0),
        (0.003, 0, 0, 0),
        (0.003, 1, 0, 0.15),
        (0.003, 1, 1, 0.15),
        (0.03, 0, 0, 1),
        (0.03, 0, 1, 0),  # the read waited for a processor, which a thread would do, too
    ],
)
def test_reads_pause_after_one_that_waited(
    monkeypatch: pytest.MonkeyPatch, seconds: float, disk_reads: int, preemptions: int, pause: float
) -> None:
    now, usage = 0.0, SimpleNamespace(ru_inblock=0, ru_nivcsw=0)
    observed: list[float] = []
    monkeypatch.setattr(loop_reads, "monotonic", lambda: now)
    monkeypatch.setattr(loop_reads, "getrusage", lambda _: SimpleNamespace(**vars(usage)))
    reads = LoopReads(observed.append)

    def read() -> str:
        nonlocal now
        now += seconds
        usage.ru_inblock += disk_reads
        usage.ru_nivcsw += preemptions
        return "content"

    assert reads.run(read) == "content"
    assert observed == [seconds]
    now += pause - 0.001
    assert reads.allowed is (pause == 0)
    now += 0.002
    assert reads.allowed

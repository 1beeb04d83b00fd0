"""No queued path is lost: not by a kill at any moment, a full disk, a clock set back, or a week of failures."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from harmonia.errors import ConfigError
from harmonia.nix.store_path import StorePath
from harmonia.store.new_paths import Cursor
from harmonia.upload.queue import FIRST_DELAY_S, MAX_DELAY_S, Item, QueueWriteError, UploadQueue
from support.preloaded import PATCHED, popen
from support.small_disk import mounted

HOUR_S = 3600.0
CURSOR = Cursor("database", 7)
MANY = 100_000


def path(number: int) -> StorePath:
    return StorePath(f"{number:032}-path")


A, B, C = map(path, range(3))


@pytest.fixture
def clock() -> SimpleNamespace:
    return SimpleNamespace(now=1e9)


@pytest.fixture
def open_queue(tmp_path: Path, clock: SimpleNamespace) -> Iterator[Callable[..., UploadQueue]]:
    opened: list[UploadQueue] = []

    def open_queue(directory: Path = tmp_path) -> UploadQueue:
        for queue in opened:
            queue.close()
        opened.append(UploadQueue(str(directory / "queue.sqlite"), lambda: float(clock.now)))
        return opened[-1]

    yield open_queue
    for queue in opened:
        queue.close()


@pytest.fixture
def queue(open_queue: Callable[..., UploadQueue]) -> UploadQueue:
    return open_queue()


def due(queue: UploadQueue, limit: int = 10) -> list[StorePath]:
    return [item.path for item in queue.due(limit)]


def item(queue: UploadQueue, path: StorePath) -> Item:
    [found] = [item for item in queue.due(10) if item.path == path]
    return found


class TestOrder:
    def test_oldest_path_is_first_and_removed_paths_are_gone(self, queue: UploadQueue) -> None:
        assert queue.add([C, A]) == 2
        assert queue.add([B]) == 1
        assert due(queue) == [C, A, B]
        assert due(queue, 2) == [C, A]
        assert [item.path for item in queue.due(2, {C})] == [A, B]
        queue.remove([A])
        assert due(queue) == [C, B]

    def test_queued_path_keeps_its_place_and_its_delay(self, queue: UploadQueue, clock: SimpleNamespace) -> None:
        queue.add([A, B])
        queue.postpone(item(queue, A), "status 403")
        assert queue.add([A, B]) == 0
        assert due(queue) == [B]
        clock.now += HOUR_S
        assert due(queue) == [A, B]

    def test_cursor_and_paths_are_kept_together(self, open_queue: Callable[..., UploadQueue]) -> None:
        queue = open_queue()
        assert queue.cursor() is None
        queue.add([A], CURSOR)
        queue.add([B])
        queue = open_queue()
        assert queue.cursor() == CURSOR
        assert due(queue) == [A, B]


class TestDelays:
    def test_delay_doubles_up_to_an_hour(self, queue: UploadQueue, clock: SimpleNamespace) -> None:
        queue.add([A])
        for attempt in range(20):
            assert item(queue, A).attempts == attempt
            delay = queue.postpone(item(queue, A), "timeout")
            expected = min(FIRST_DELAY_S * 2**attempt, MAX_DELAY_S)
            assert 0.7 * expected < delay < 1.3 * expected
            assert queue.next_due() == clock.now + delay
            assert due(queue) == []
            clock.now += delay + 0.001
        assert item(queue, A).error == "timeout"
        assert queue.next_due() is None

    def test_delay_is_at_least_what_the_target_asked_for(self, queue: UploadQueue) -> None:
        queue.add([A])
        assert queue.postpone(item(queue, A), "status 429", 90) == 90

    def test_path_that_fails_for_a_week_stays_and_others_overtake_it(
        self, open_queue: Callable[..., UploadQueue], clock: SimpleNamespace
    ) -> None:
        queue = open_queue()
        queue.add([A, B])
        attempts, end = 0, clock.now + 7 * 86400
        while clock.now < end:
            for failing in queue.due(10):
                attempts += 1
                queue.postpone(failing, "connection refused")
            if attempts % 20 == 0:
                queue = open_queue()  # a restart changes nothing
            clock.now = queue.next_due() or end
        assert attempts < 2 * (7 * 24 / 0.75 + 12)
        queue.add([C])
        assert C in due(queue)
        statistics = queue.statistics()
        assert (statistics.items, statistics.failing, statistics.oldest) == (3, 2, 1e9)

    def test_clock_set_back_does_not_prolong_a_delay(self, queue: UploadQueue, clock: SimpleNamespace) -> None:
        queue.add([A])
        queue.postpone(item(queue, A), "timeout")
        clock.now -= 365 * 86400
        assert due(queue) == [A]


class TestFile:
    def test_second_process_is_refused(self, queue: UploadQueue, tmp_path: Path) -> None:
        queue.add([A])
        with pytest.raises(ConfigError, match=r"another process uses the queue .* set another watch\.state_dir"):
            UploadQueue(str(tmp_path / "queue.sqlite"))

    def test_missing_directory_and_damaged_file_are_errors(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="writable directory"):
            UploadQueue(str(tmp_path / "none" / "queue.sqlite"))
        (tmp_path / "queue.sqlite").write_bytes(b"no database" * 1000)
        with pytest.raises(ConfigError, match="remove the file"):
            UploadQueue(str(tmp_path / "queue.sqlite"))

    def test_file_that_is_damaged_while_it_is_open_is_an_error(self, queue: UploadQueue, tmp_path: Path) -> None:
        queue.add(map(path, range(MANY)))
        file = tmp_path / "queue.sqlite"
        file.write_bytes(b"damaged " * (file.stat().st_size // 8))
        with pytest.raises(ConfigError, match=r"cannot use the queue .*remove the file"):
            queue.statistics()

    def test_file_of_a_newer_version_is_not_touched(self, tmp_path: Path) -> None:
        with closing(sqlite3.connect(tmp_path / "queue.sqlite")) as connection:
            connection.execute("pragma user_version = 2")
        with pytest.raises(ConfigError, match="newer version"):
            UploadQueue(str(tmp_path / "queue.sqlite"))

    @pytest.mark.slow
    def test_100000_paths_are_queued_and_removed(self, open_queue: Callable[..., UploadQueue]) -> None:
        queue = open_queue()
        for first in range(0, MANY, 1000):
            queue.add(map(path, range(first, first + 1000)), CURSOR._replace(number=first + 1000))
        queue = open_queue()
        assert queue.statistics().items == MANY
        assert due(queue, 3) == [A, B, C]
        for first in range(0, MANY, 1000):
            queue.remove(map(path, range(first, first + 1000)))
        assert queue.statistics().items == 0

    @pytest.mark.root
    def test_full_disk_loses_nothing(
        self, tmp_path: Path, open_queue: Callable[..., UploadQueue], caplog: pytest.LogCaptureFixture
    ) -> None:
        with mounted(tmp_path / "disk", "400k") as disk:
            queue = open_queue(disk)
            queued = 0
            with suppress(QueueWriteError):
                while True:
                    queue.add(map(path, range(queued, queued + 50)), CURSOR._replace(number=queued + 50))
                    queued += 50
            assert queued > 100
            with open(disk / "filler", "wb", buffering=0) as filler, suppress(OSError):
                while True:
                    filler.write(bytes(512))
            queue.remove([A])
            queue.postpone(item(queue, B), "timeout")
            assert due(queue, 1) == [C]
            with pytest.raises(QueueWriteError):
                queue.add(map(path, range(queued, queued + 1000)), CURSOR)
            assert len([line for line in caplog.messages if "cannot write the queue" in line]) <= 2
            (disk / "filler").unlink()
            queue.add([], CURSOR._replace(number=queued))
            queue = open_queue(disk)
            assert queue.cursor() == CURSOR._replace(number=queued)
            assert queue.statistics().items == queued - 1
            queue.close()


WORKER = """
import sys
from harmonia.nix.store_path import StorePath
from harmonia.store.new_paths import Cursor
from harmonia.upload.queue import UploadQueue

queue = UploadQueue(sys.argv[1])
print(flush=True)
number = cursor.number if (cursor := queue.cursor()) else 0
while True:
    queue.add([StorePath(f"{number + i:032}-path") for i in range(3)], Cursor("database", number + 3))
    number += 3
    for item in queue.due(2):
        print(item.path, flush=True)  # the upload, before it is removed
        queue.remove([item.path])
"""


def work_until_killed(file: Path, seconds: float, *, least: int = 0) -> list[str]:
    """Return what a process has uploaded until it was killed, so many seconds after its upload of `least` paths."""
    worker: subprocess.Popen[str] = popen(
        [*PATCHED, WORKER, str(file)], env=os.environ, stdout=subprocess.PIPE, text=True
    )
    with worker:
        assert worker.stdout
        worker.stdout.readline()
        uploaded = [worker.stdout.readline().strip() for _ in range(least)]
        time.sleep(seconds)
        os.kill(worker.pid, signal.SIGKILL)
        return uploaded + worker.stdout.read().split()


@pytest.mark.parametrize("kills", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_process_loses_no_path(tmp_path: Path, kills: int) -> None:
    file = tmp_path / "queue.sqlite"
    chance = random.Random(1)
    uploaded = [name for _ in range(kills - 1) for name in work_until_killed(file, chance.uniform(0, 0.06))]
    uploaded += work_until_killed(file, chance.uniform(0, 0.06), least=1)  # some are, also on a slow disk
    with closing(UploadQueue(str(file))) as queue:
        cursor = queue.cursor()
        assert cursor
        left = [item.path for item in queue.due(sys.maxsize >> 1)]
    assert {*uploaded, *left} == set(map(path, range(cursor.number)))
    assert len(uploaded) + len(left) <= cursor.number + kills  # at most the one of each kill is uploaded twice

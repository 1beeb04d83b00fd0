"""The main process: it forks the workers that serve, replaces one that dies, and takes them all with it when it goes.

It holds the listening sockets, to hand them on, and does no work of its own. Each worker has a socket pair to it, its
*lifeline*. There the worker writes a byte whenever its event loop comes round: so a worker that hangs is known, and
systemd's watchdog hears only of what really serves. And there it reads the end of file when the main process is gone.
"""

import logging
import os
import selectors
import signal
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from harmonia.process import systemd

_HEARTBEAT_S = 1.0  # seconds between a worker's signs of life
_HANG_TIMEOUT_S = 30.0  # seconds without one, after which a worker is killed and replaced
_RETRY_DELAY_S = 1.0  # seconds before another try, where a worker died before it could serve
_KILL_DELAY_S = 2.0  # seconds beyond the grace that a worker gets to end by itself

_log = logging.getLogger("harmonia")

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)

Work = Callable[[int, Sequence[socket.socket], socket.socket, float], None]
"""What a worker does until SIGTERM: given its place, what it listens on, its lifeline, and the seconds between signs of
life. The place is a number from 0 that no other has at the time.

SIGHUP is ignored until it has a handler of its own.
"""


@dataclass
class _Worker:
    pid: int
    place: int
    lifeline: socket.socket
    beat: float
    ready: bool = False


class Supervisor:
    def __init__(self, work: Work, listening: Sequence[socket.socket], workers: int, grace: float) -> None:
        """`grace` is how many seconds running requests get after SIGTERM; the workers keep to it by themselves.

        From here on, signals do not end this process: `run` heeds those that came before it.
        """
        self._work = work
        self._listening = listening
        self._count = workers
        self._grace = grace
        self._workers: dict[int, _Worker] = {}
        self._selector = selectors.DefaultSelector()
        self._signals, self._wakeup = socket.socketpair()
        self._signals.setblocking(False)
        self._wakeup.setblocking(False)
        signal.set_wakeup_fd(self._wakeup.fileno())
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)  # so that it reaches the wakeup socket
        self._watchdog = systemd.watchdog_interval()
        self._heartbeat = min(_HEARTBEAT_S, (self._watchdog or _HEARTBEAT_S) / 2)
        self._announced = False
        self._next_start = 0.0
        self._stop_at: float | None = None
        self._failed = False

    def run(self) -> int:
        """Serve until told to stop. Returns the exit status: 1 where no worker is left and none can be had."""
        self._selector.register(self._signals, selectors.EVENT_READ)
        while self._stop_at is None or self._workers:
            if self._stop_at is None:
                self._fill()
            for key, _ in self._selector.select(timeout=self._heartbeat):
                if key.data is None:
                    self._handle(self._signals.recv(64))
                else:
                    self._listen(key.data)
            self._reap()
            self._kill_overdue()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # or those that come from now on would change the exit status
        signal.set_wakeup_fd(-1)
        return 1 if self._failed else 0

    def _fill(self) -> None:
        while len(self._workers) < self._count and time.monotonic() >= self._next_start:
            place = min(set(range(self._count)) - {worker.place for worker in self._workers.values()})
            try:
                ours, theirs = socket.socketpair()
            except OSError as error:
                self._retry_later(error)
                return
            signal.pthread_sigmask(
                signal.SIG_BLOCK, _SIGNALS
            )  # the worker must not lose one before it has its own handlers
            try:
                pid = os.fork()
                if pid == 0:
                    self._become_worker(place, ours, theirs)
            except OSError as error:
                self._retry_later(error)
                ours.close()
                return
            finally:
                theirs.close()
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            ours.setblocking(False)
            worker = _Worker(pid, place, ours, time.monotonic())
            self._workers[pid] = worker
            self._selector.register(ours, selectors.EVENT_READ, worker)

    def _retry_later(self, error: OSError) -> None:
        _log.error("cannot start a worker: %s", error)
        self._next_start = time.monotonic() + _RETRY_DELAY_S

    def _become_worker(self, place: int, ours: socket.socket, theirs: socket.socket) -> NoReturn:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in _SIGNALS:
                # A terminal sends SIGINT to the whole group, but it is for the main process to decide.
                ignored = number in (signal.SIGINT, signal.SIGHUP)
                signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            self._selector.close()
            # A copy of another worker's lifeline would hide from it that the main process is gone.
            for held in (ours, self._signals, self._wakeup, *(worker.lifeline for worker in self._workers.values())):
                held.close()
            self._work(place, self._listening, theirs, self._heartbeat)
            status = 0
        except BaseException:  # noqa: BLE001 (this process has nobody else to tell)
            _log.critical("worker failed: %s", traceback.format_exc())
        finally:
            os._exit(status)  # neither the main process's clean-up nor a thread that still reads may keep it

    def _listen(self, worker: _Worker) -> None:
        try:
            if not worker.lifeline.recv(64):
                return  # it is ending; SIGCHLD tells how
        except (BlockingIOError, ConnectionError):
            return
        worker.beat = time.monotonic()
        worker.ready = True
        if self._stop_at is None:
            if not self._announced and sum(each.ready for each in self._workers.values()) == self._count:
                self._announced = True
                systemd.notify("READY=1")
            if self._watchdog and self._announced:  # systemd counts from READY=1 on
                systemd.notify("WATCHDOG=1")

    def _handle(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            if number == signal.SIGHUP:
                self._signal_all(signal.SIGHUP)
            elif number in (signal.SIGTERM, signal.SIGINT):
                name = signal.Signals(number).name
                if self._stop_at is None:
                    _log.info("%s: stopping; requests being answered have %g s to end", name, self._grace)
                    self._stop(self._grace)
                else:
                    _log.info("%s again: stopping at once", name)
                    self._stop_at = time.monotonic()

    def _stop(self, grace: float) -> None:
        systemd.notify("STOPPING=1")
        self._stop_at = time.monotonic() + grace + _KILL_DELAY_S
        for each in self._listening:
            each.close()  # or connections would still be taken, to wait for nobody
        self._signal_all(signal.SIGTERM)

    def _signal_all(self, number: signal.Signals) -> None:
        for pid in self._workers:
            os.kill(pid, number)

    def _reap(self) -> None:
        while self._workers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            worker = self._workers.pop(pid, None)
            if worker is None:
                continue
            self._selector.unregister(worker.lifeline)
            worker.lifeline.close()
            with suppress(BlockingIOError):  # who told it to stop may have told us, too
                self._handle(self._signals.recv(64))
            if self._stop_at is not None:
                continue
            code = os.waitstatus_to_exitcode(status)
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
            _log.error(
                "worker %d ended %s%s", pid, how, ", it is replaced" if worker.ready else " before it could serve"
            )
            if not worker.ready:
                self._next_start = time.monotonic() + _RETRY_DELAY_S
                if not any(each.ready for each in self._workers.values()):
                    _log.critical("no worker is left")
                    self._failed = True
                    self._stop(0)

    def _kill_overdue(self) -> None:
        now = time.monotonic()
        for worker in self._workers.values():
            if self._stop_at is not None and now >= self._stop_at:
                os.kill(worker.pid, signal.SIGKILL)
            elif now - worker.beat > _HANG_TIMEOUT_S:
                _log.error("worker %d hangs", worker.pid)
                worker.beat = now
                os.kill(worker.pid, signal.SIGKILL)

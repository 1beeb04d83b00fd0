"""Supervisor, the main process: forks the workers, replaces a worker that ends or hangs, and stops all of them.

The main process holds the listening sockets for new workers, and serves no requests itself. It is connected to each
worker by a socket pair, the *lifeline*. The worker's event loop regularly writes a byte to it, a heartbeat: without
heartbeats, the worker hangs. systemd's watchdog gets its signal only after heartbeats. If the main process ends, the
worker reads the end of file from the lifeline.
"""

import logging
import os
import select
import selectors
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from harmonia.process import systemd

_HEARTBEAT_S = 1.0  # between two heartbeats of a worker
_HANG_TIMEOUT_S = 30.0  # without a heartbeat, until a worker is killed and replaced
_RETRY_DELAY_S = 1.0  # before the next start, if a worker ended before it was ready
_KILL_DELAY_S = 2.0  # between the end of the grace period and SIGKILL

_log = logging.getLogger("harmonia")

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)

Work = Callable[[int, Sequence[socket.socket], socket.socket, float], None]
"""The function that a worker runs until SIGTERM.

Its arguments are the worker's slot, the listening sockets, the lifeline, and the seconds between two heartbeats. The
slot is a number from 0 that no other running worker has. SIGHUP is ignored until the function installs a handler.
"""


Activity = Callable[[], tuple[float, bool]]
"""Returns the number of responses so far, and whether a request is in flight."""


@dataclass
class _Worker:
    pid: int
    slot: int
    lifeline: socket.socket
    beat: float
    ready: bool = False


class Supervisor:
    """The main process's control of its workers."""

    def __init__(
        self,
        work: Work,
        listening: Sequence[socket.socket],
        workers: int,
        grace: float,
        idle: tuple[float, Activity] | None = None,
    ) -> None:
        """Install handlers for signals, which `run` handles, including those that come before it.

        `grace` is the number of seconds that running requests have after SIGTERM. The workers themselves observe it.
        With `idle`, the server stops after so many seconds without activity.
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
            signal.signal(number, lambda *_: None)  # needed for the wakeup socket
        self._watchdog = systemd.watchdog_interval()
        self._heartbeat_s = min(_HEARTBEAT_S, (self._watchdog or _HEARTBEAT_S) / 2)
        self._announced = False
        self._next_start = 0.0
        self._stop_at: float | None = None
        self._failed = False
        self._idle = idle
        self._last_activity: tuple[float, object] = time.monotonic(), None
        self._looked_at = time.monotonic()

    def run(self) -> int:
        """Run the workers until a signal stops them, and return the exit status.

        The status is 1 if no worker is left and none can be started.
        """
        self._selector.register(self._signals, selectors.EVENT_READ)
        while self._stop_at is None or self._workers:
            if self._stop_at is None:
                self._fill()
            for key, _ in self._selector.select(timeout=self._heartbeat_s):
                if key.data is None:
                    self._handle(self._signals.recv(64))
                else:
                    self._listen(key.data)
            self._reap()
            self._kill_overdue()
            self._stop_if_idle()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # a late signal must not change the exit status
        signal.set_wakeup_fd(-1)
        return 1 if self._failed else 0

    def _fill(self) -> None:
        while len(self._workers) < self._count and time.monotonic() >= self._next_start:
            slot = min(set(range(self._count)) - {worker.slot for worker in self._workers.values()})
            try:
                ours, theirs = socket.socketpair()
            except OSError as error:
                self._retry_later(error)
                return
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until the worker has its own handlers
            try:
                pid = os.fork()
                if pid == 0:
                    self._become_worker(slot, ours, theirs)
            except OSError as error:
                self._retry_later(error)
                ours.close()
                return
            finally:
                theirs.close()
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            ours.setblocking(False)
            worker = _Worker(pid, slot, ours, time.monotonic())
            self._workers[pid] = worker
            self._selector.register(ours, selectors.EVENT_READ, worker)

    def _retry_later(self, error: OSError) -> None:
        _log.error("cannot start a worker: %s; trying again in %g s", error, _RETRY_DELAY_S)
        self._next_start = time.monotonic() + _RETRY_DELAY_S

    def _become_worker(self, slot: int, ours: socket.socket, theirs: socket.socket) -> NoReturn:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in _SIGNALS:
                # A terminal sends SIGINT to the whole process group, but only the main process handles it.
                ignored = number in (signal.SIGINT, signal.SIGHUP)
                signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            self._selector.close()
            # With an open copy of another worker's lifeline, that worker would not see the end of the main process.
            lifelines = [worker.lifeline for worker in self._workers.values()]
            for inherited in (ours, self._signals, self._wakeup, *lifelines):
                inherited.close()
            self._work(slot, self._listening, theirs, self._heartbeat_s)
            status = 0
        except BaseException:  # noqa: BLE001 (nothing else reports an error of this process)
            _log.critical("worker failed: %s", traceback.format_exc())
        finally:
            os._exit(status)  # skip the main process's clean-up, and do not wait for threads

    def _listen(self, worker: _Worker) -> None:
        try:
            if not worker.lifeline.recv(64):
                self._close_lifeline(worker)  # the worker is ending; SIGCHLD follows
                return
        except (BlockingIOError, ConnectionError):
            return
        worker.beat = time.monotonic()
        worker.ready = True
        if self._stop_at is None:
            if not self._announced and sum(each.ready for each in self._workers.values()) == self._count:
                self._announced = True
                systemd.notify("READY=1")
            if self._watchdog and self._announced:  # the watchdog starts with READY=1
                systemd.notify("WATCHDOG=1")

    def _close_lifeline(self, worker: _Worker) -> None:
        if worker.lifeline.fileno() != -1:
            self._selector.unregister(worker.lifeline)
            worker.lifeline.close()

    def _handle(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            if number == signal.SIGHUP:
                self._signal_all(signal.SIGHUP)
            elif number in (signal.SIGTERM, signal.SIGINT):
                name = signal.Signals(number).name
                if self._stop_at is None:
                    _log.info("%s: stopping; running requests have %g s to finish", name, self._grace)
                    self._stop(self._grace)
                else:
                    _log.info("%s again: stopping at once", name)
                    self._stop_at = time.monotonic()

    def _stop(self, grace: float) -> None:
        systemd.notify("STOPPING=1")
        self._stop_at = time.monotonic() + grace + _KILL_DELAY_S
        for each in self._listening:
            each.close()  # otherwise the kernel accepts new connections that no worker serves
        self._signal_all(signal.SIGTERM)

    def _stop_if_idle(self) -> None:
        if self._idle is None or self._stop_at is not None:
            return
        patience, activity = self._idle
        responses, is_busy = activity()
        now = time.monotonic()
        if is_busy or responses != self._last_activity[1]:
            self._last_activity = now, responses
        elif now - self._last_activity[0] >= patience:
            _log.info("no request for %g s: stopping, until the next connection", patience)
            self._stop(self._grace)

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
            self._close_lifeline(worker)
            with suppress(BlockingIOError):  # the signal that ended the worker may have been sent to us, too
                self._handle(self._signals.recv(64))
            if self._stop_at is not None:
                continue
            code = os.waitstatus_to_exitcode(status)
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
            _log.error("worker %d ended %s%s", pid, how, "; replacing it" if worker.ready else " before it was ready")
            if not worker.ready:
                self._next_start = time.monotonic() + _RETRY_DELAY_S
                if not any(each.ready for each in self._workers.values()):
                    _log.critical("no worker is left; stopping")
                    self._failed = True
                    self._stop(0)

    def _kill_overdue(self) -> None:
        now = time.monotonic()
        halted = max(now - self._looked_at - self._heartbeat_s, 0)
        self._looked_at = now
        for worker in self._workers.values():
            worker.beat += halted  # a machine that was paused has halted the workers, too
            if self._stop_at is not None and now >= self._stop_at:
                os.kill(worker.pid, signal.SIGKILL)
            elif now - worker.beat > _HANG_TIMEOUT_S:
                _log.error("worker %d hangs: no heartbeat for %g s; killing it", worker.pid, _HANG_TIMEOUT_S)
                worker.beat = now
                os.kill(worker.pid, signal.SIGKILL)


def beat_while_alive(
    thread: threading.Thread, lifeline: socket.socket, heartbeat_s: float, each: Callable[[], object] = lambda: None
) -> None:
    """Send heartbeats, and call `each` with every one, until the thread ends. Exit if the supervisor ends.

    For a process whose work is done by threads of low priority. They may get no processor for longer than a hang lasts.
    """
    lifeline.setblocking(False)
    while thread.is_alive():
        with suppress(BlockingIOError):  # the supervisor has unread heartbeats
            lifeline.send(b".")
        each()
        if select.select([lifeline], [], [], heartbeat_s)[0]:  # the supervisor has ended
            os._exit(1)

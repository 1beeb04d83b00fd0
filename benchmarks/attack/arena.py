"""Server under attack with a bystander, and the bounds on waiting time, memory and leftovers."""

import os
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from benchmarks.attack.client import Asked, Bystander, Target
from benchmarks.attack.stores import MIB, AttackedStore, Form, narinfo
from harmonia.nix.path_info import PathInfo
from support.running import HARMONIA, Server, peak_bytes
from support.unscathed import unscathed

_NOISE = 4
"""On a busy machine, the p99 may be this many times that before the attack."""
_SETTLES_S = 60.0
_LEAST_ASKED = 20
"""Requests of the bystander, before and during an attack."""


@dataclass
class Outcome:
    """Result of one attack."""

    name: str
    memory_bound_mib: int
    quiet_ms: float = 0.0
    """p99 of the bystander's narinfos before the attack."""
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    memory_mib: float = 0.0
    """Peak memory of the largest worker."""
    counts: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    """Descriptions of the violated bounds."""

    def require(self, holds: object, what: str) -> None:
        """Record a violated bound unless it holds."""
        if not holds:
            self.broken.append(what)

    @property
    def row(self) -> str:
        waits = f"{self.p50_ms:.0f}, {self.p99_ms:.0f} ms ({self.quiet_ms:.0f} ms)" if self.p99_ms else "-"
        memory = f"{self.memory_mib:.0f} of {self.memory_bound_mib} MiB" if self.memory_mib else "-"
        counted = ", ".join(f"{name}: {count:,}" for name, count in self.counts.items())
        return f"| {self.name} | {waits} | {memory} | {counted} | {'; '.join(self.broken) or 'holds'} |"


@dataclass
class Arena:
    form: Form
    directory: Path
    """Directory of the store. The first attack that needs the store creates it."""
    outcomes: list[Outcome] = field(default_factory=list)

    @cached_property
    def store(self) -> AttackedStore:
        return AttackedStore(self.directory, self.form)

    def wait(self) -> None:
        """Wait for the duration of an attack."""
        time.sleep(self.form.seconds)

    @contextmanager
    def outcome(self, name: str, memory_bound_mib: int = 0) -> Iterator[Outcome]:
        """Record the outcome of an attack. An AssertionError counts as a violated bound."""
        outcome = Outcome(name, memory_bound_mib)
        try:
            yield outcome
        except AssertionError as error:
            outcome.broken.append(" ".join(str(error).split())[:300])
        self.outcomes.append(outcome)
        print(outcome.row, flush=True)

    @contextmanager
    def served(
        self,
        name: str,
        settings: str = "",
        *,
        memory_bound_mib: int = 0,
        root: Path | None = None,
        program: Sequence[str] = HARMONIA,
        **options: object,
    ) -> Iterator[tuple[Server, Outcome]]:
        """Serve the store of `root` (default: the arena's) during the `with` block, which attacks it."""
        # A fork of a process with all modules would have other memory, and /proc would not show its arguments.
        command = ["env", *program]
        with tempfile.TemporaryDirectory(prefix="harmonia-") as temp:
            server = Server(
                Path(temp, "server"),
                root or self.store.root,
                settings,
                program=command,
                **options,  # type: ignore[arg-type]
            )
            server.start()  # a server that does not start ends the run: that is no outcome of an attack
            with self.outcome(name, memory_bound_mib) as outcome:
                try:
                    yield server, outcome
                finally:
                    server.stop()
                require_nothing_left(server, outcome)

    @contextmanager
    def attacked(
        self,
        name: str,
        settings: str = "",
        *,
        memory_bound_mib: int = 250,
        headers: Mapping[str, str] | None = None,
        unharmed: Sequence[PathInfo] | None = None,
        **options: object,
    ) -> Iterator[tuple[Server, Outcome]]:
        """Serve the arena's store with a bystander that sends `headers`, and check the bounds during the attack.

        Before and after, the paths of `unharmed` (default: a small path) must be served.
        """
        with self.served(name, settings, memory_bound_mib=memory_bound_mib, **options) as (  # type: ignore[arg-type]
            server,
            outcome,
        ):
            bystander = Bystander(Target(server.url), [narinfo(info) for info in self.store.small], headers or {})
            unharmed_paths = self.store.small[:1] if unharmed is None else unharmed
            with unscathed(server, *unharmed_paths, seconds=_SETTLES_S):
                with bystander.asking():
                    connected = time.monotonic()
                    time.sleep(self.form.quiet_s)
                    began = time.monotonic()
                    yield server, outcome
                    ended = time.monotonic()
                    outcome.memory_mib = max(map(peak_bytes, server.workers), default=0) / MIB
                asked = [each for each in bystander.asked if each.due >= connected]
                _judge(outcome, asked, began, ended, self.form.max_wait_ms)


def _judge(outcome: Outcome, asked: Sequence[Asked], began: float, ended: float, max_wait_ms: float) -> None:
    quiet = [each.seconds * 1e3 for each in asked if each.due < began]
    during = [each for each in asked if began <= each.due <= ended]
    if min(len(quiet), len(during)) < _LEAST_ASKED:
        outcome.broken.append("the machine was paused for most of the time")
        return
    waits = [each.seconds * 1e3 for each in during]
    outcome.quiet_ms, outcome.p50_ms, outcome.p99_ms = _p99(quiet), statistics.median(waits), _p99(waits)
    bound = max(max_wait_ms, _NOISE * outcome.quiet_ms)
    outcome.require(outcome.p99_ms <= bound, f"others wait {outcome.p99_ms:.0f} ms; at most {bound:.0f}")
    for failure, count in Counter(each.outcome for each in during if each.outcome != "200").items():
        outcome.broken.append(f"{count} of {len(during)} narinfos of others: {failure}")
    outcome.require(
        outcome.memory_mib <= outcome.memory_bound_mib,
        f"{outcome.memory_mib:.0f} MiB; at most {outcome.memory_bound_mib}",
    )


def _p99(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


def restart(server: Server) -> None:
    """Start a stopped server again, with the same settings and cache."""
    server.log.clear()  # the log has the old address
    server.start()


def require_nothing_left(server: Server, outcome: Outcome) -> None:
    """Require that a stopped server left no process and no unfinished file, and logged no traceback."""
    left = processes_of(server)
    outcome.require(not left, f"processes left: {left}")
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    growing = [file.name for file in server.cache_dir.rglob("*") if file.suffix == ".growing"]
    outcome.require(not growing, f"files left: {growing}")
    traces = [line for line in server.log if "Traceback" in line]
    outcome.require(not traces, f"{len(traces)} tracebacks")


def processes_of(server: Server) -> list[int]:
    """Return the PIDs of processes with the configuration file of this server in their arguments."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                arguments = (process / "cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(server.config) in arguments:
                found.append(int(process.name))
    return found

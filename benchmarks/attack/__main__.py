"""Attacks on a server in every known way: `make attack`, or python -m benchmarks.attack MINUTES [ATTACK…].

From 10 MINUTES on, attacks have the sizes that SECURITY.md promises; below that, they are smaller. Prints a row for
each attack, and exits with status 1 if a bound does not hold, or if the MINUTES end before the last attack begins.
ATTACK is the name of a function in one of the other modules.
Everything runs at the highest priority, if the system allows that, so waits are those of an idle machine.
The store is created once and kept in $XDG_CACHE_HOME/harmonia/attack or ~/.cache/harmonia/attack.
"""

import argparse
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.attack import connections, cuts, damage, huge_pages, huge_paths, rules, signals, upstreams
from benchmarks.attack.arena import Arena
from benchmarks.attack.stores import FULL, SHORT

_FULL_MINUTES = 10
_PRIORITY = -19  # of nice(2)
_ATTACKS = {
    attack.__name__: attack
    for module in (huge_paths, huge_pages, connections, damage, upstreams, signals, rules, cuts)
    for attack in module.ALL
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("minutes", type=float, metavar="MINUTES")
    parser.add_argument("attacks", nargs="*", choices=[*_ATTACKS, []], metavar="ATTACK")
    arguments = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    form = FULL if arguments.minutes >= _FULL_MINUTES else SHORT
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    arena = Arena(form, Path(cache, "harmonia", "attack"))
    with _priority():
        _run(arena, arguments.attacks or [*_ATTACKS], time.monotonic() + arguments.minutes * 60)
    broken = [f"BROKEN: {outcome.name}: {'; '.join(outcome.broken)}" for outcome in arena.outcomes if outcome.broken]
    print(*broken, sep="\n", end="\n" if broken else "", file=sys.stderr)
    return 1 if broken else 0


def _run(arena: Arena, attacks: Sequence[str], until: float) -> None:
    print("| attack | narinfos of another client: p50, p99 (p99 before) | memory of the worker | counted | |")
    print("|---|---|---|---|---|", flush=True)
    for name in attacks:
        if time.monotonic() > until:
            with arena.outcome(name) as outcome:
                outcome.require(False, "not started: the time is over")
        else:
            _ATTACKS[name](arena)


@contextmanager
def _priority() -> Iterator[None]:
    """Raise the priority above all other programs, if this process may do that.

    The kernel may compare priorities within a session first, so its group gets the priority too, until the end of
    `with`. A session that began before the kernel grouped processes, as in some containers, has no group, and the
    file of its group is empty (sched(7), "The autogroup feature").
    """
    try:
        os.setpriority(os.PRIO_PROCESS, 0, _PRIORITY)
        group = Path("/proc/self/autogroup")
        before = group.read_text().split()
        if before:
            group.write_text(f"{_PRIORITY}")
    except OSError as error:
        print(f"cannot raise the priority: {error}; other programs may disturb the measurement", file=sys.stderr)
        before = []
    try:
        yield
    finally:
        if before:
            group.write_text(before[-1])


if __name__ == "__main__":
    sys.exit(main())

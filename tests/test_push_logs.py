"""Pushed build logs stay for `push.keep`, and those of which a worker died while it received them for six hours."""

import os
import time
from contextlib import closing
from pathlib import Path

from harmonia.nix.store_path import StorePath
from harmonia.push.log_store import LogStore

DERIVATION = StorePath(f"{'0' * 32}-name.drv")
HOUR = 3600.0


def aged(path: Path, hours: float) -> None:
    then = time.time() - hours * HOUR
    os.utime(path, (then, then))


def test_old_and_partial_logs_are_removed(tmp_path: Path) -> None:
    logs = LogStore(str(tmp_path), 24 * HOUR)
    with closing(logs.receive(DERIVATION, None)) as incoming:
        incoming.write(b"line\n")
        incoming.keep()
    log = tmp_path / "drvs/00" / f"{DERIVATION[2:]}.zst"
    with closing(logs.receive(DERIVATION, None)):
        (partial,) = (path for path in log.parent.iterdir() if path != log)
        for age, left in ((5, {log, partial}), (7, {log}), (25, set())):
            for path in log.parent.iterdir():
                aged(path, age)
            logs.expire()
            assert set(log.parent.iterdir()) == left

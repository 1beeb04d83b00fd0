"""`.ci/run`: each step runs, and the last lines name those that failed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).parents[1] / ".ci/run"
PROGRAMS = ("apt-get", "make", "python3")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Return a clone whose programs print their arguments, and fail if these contain a word of $FAILING."""
    fake = (
        '#!/bin/sh\necho "$(basename "$0") $*"\nfor each in $FAILING; do case "$0 $*" in *$each*) exit 2;; esac; done\n'
    )
    for name in (*(f"bin/{program}" for program in PROGRAMS), "tests/e2e/newer-nix-roots.sh"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(fake)
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".ci").mkdir()
    shutil.copy(RUN, tmp_path / ".ci")
    return tmp_path


def run(clone: Path, failing: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{clone}/bin:{os.environ['PATH']}", "FAILING": failing}
    return subprocess.run([clone / ".ci/run"], env=environment, capture_output=True, text=True, check=False)


def test_all_steps_pass(clone: Path) -> None:
    done = run(clone, "")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "All steps passed")
    for target in ("test", "test-slow", "test-versions", "fuzz", "audit", "soak", "attack", "bench"):
        assert f"\nmake {target}" in done.stdout


def test_failed_steps_are_named_last_and_stop_no_other(clone: Path) -> None:
    done = run(clone, "test-slow audit")
    assert done.returncode == 1
    assert "\nmake bench" in done.stdout
    assert done.stdout.splitlines()[-5:] == [
        "== the end of: make audit",
        "make audit",
        "",
        "FAILED: make test-slow",
        "FAILED: make audit",
    ]


def test_failed_installation_stops_everything(clone: Path) -> None:
    done = run(clone, "apt-get")
    assert done.returncode == 2
    assert "make" not in done.stdout

"""CI checks the titles of new commits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.pages import ROOT
from support.programs import needs

pytestmark = needs("git")

SCRIPT = (ROOT / ".ci/titles.py").read_text()


def git(directory: Path, *arguments: str) -> str:
    identity = {
        f"GIT_{role}_{field}": value
        for role in ("AUTHOR", "COMMITTER")
        for field, value in (("NAME", "a"), ("EMAIL", "a@b"))
    }
    environment = {**os.environ, **identity, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    command = ["git", "-C", str(directory), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def commit(repository: Path, title: str) -> str:
    git(repository, "commit", "--quiet", "--allow-empty", "--message", f"{title}\n\nCause.")
    return git(repository, "rev-parse", "HEAD")


def check(clone: Path, last_unchecked: str) -> subprocess.CompletedProcess[str]:
    """Run the script in a clone, with another commit as the last unchecked one."""
    program = SCRIPT.replace('LAST_UNCHECKED = "9cb4e0b"', f'LAST_UNCHECKED = "{last_unchecked}"')
    assert program != SCRIPT
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=clone, capture_output=True, text=True, check=False)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    path = tmp_path / "repository"
    path.mkdir()
    git(path, "init", "--quiet")
    return path


@pytest.mark.parametrize(
    "title",
    [
        "cache: release the writer lock when a reader fails",
        "cache, upstream: embed the digest",
        "nixos-tests: pass the key",
        f"docs: {'x' * 66}",
    ],
)
def test_title_with_area_and_imperative_passes(repository: Path, title: str) -> None:
    old = commit(repository, "Old titles have other forms.")
    commit(repository, title)
    checked = check(repository, old)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize(
    ("title", "fault"),
    [
        ("Release the writer lock", "does not have the form"),
        ("Cache: release the writer lock", "does not have the form"),
        ("cache: Release the writer lock", "does not have the form"),
        ("cache: release the writer lock.", "does not have the form"),
        ("cache: releases the writer lock", "'releases' is not an imperative"),
        ("cache: released the writer lock", "'released' is not an imperative"),
        ("cache: releasing the writer lock", "'releasing' is not an imperative"),
        (f"docs: {'x' * 67}", "73 characters; at most 72"),
    ],
)
def test_other_title_fails_and_the_fault_is_named(repository: Path, title: str, fault: str) -> None:
    old = commit(repository, "Old titles have other forms.")
    faulty = commit(repository, title)
    commit(repository, "docs: add an example")
    checked = check(repository, old)
    assert checked.returncode == 1
    assert checked.stderr.startswith(f"{faulty[:7]} {title}: {fault}")
    assert checked.stderr.count("\n") == 1


def test_shallow_clone_without_the_old_commits_checks_its_own_commits(repository: Path, tmp_path: Path) -> None:
    old = commit(repository, "Old titles have other forms.")
    commit(repository, "cache: releases the lock")
    commit(repository, "docs: add an example")
    for depth, status in ((1, 0), (2, 1)):
        clone = tmp_path / f"depth-{depth}"
        git(tmp_path, "clone", "--quiet", f"--depth={depth}", f"file://{repository}", str(clone))
        assert check(clone, old).returncode == status


def test_directory_without_git_is_skipped(tmp_path: Path) -> None:
    checked = check(tmp_path, "0" * 40)
    assert checked.returncode == 0
    assert "SKIPPED" in checked.stderr

"""Temporary directories of uploads: those of killed commands are removed by the next one, and no others."""

import errno
import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from harmonia.upload import scratch
from support.running import wait_until

HOLD = """
from harmonia.upload import scratch
with scratch.directory() as path:
    open(path + '/nar', 'w').close()
    input()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_directory_is_removed_at_the_end(temporary: Path) -> None:
    with scratch.directory() as path:
        (Path(path) / "nar").touch()
        assert [str(each) for each in temporary.iterdir()] == [path]
    assert not list(temporary.iterdir())


def test_directory_of_a_killed_process_is_removed_by_the_next_one(temporary: Path) -> None:
    command = [sys.executable, "-c", HOLD]
    with subprocess.Popen(command, env={**os.environ, "TMPDIR": str(temporary)}, stdin=subprocess.PIPE) as holder:
        wait_until(lambda: list(temporary.glob("*/nar")))
        (held,) = temporary.iterdir()
        with scratch.directory() as path:
            assert {*temporary.iterdir()} == {held, Path(path)}
        holder.kill()
        holder.wait()
    with scratch.directory() as path:
        assert [str(each) for each in temporary.iterdir()] == [path]


def test_directory_is_made_once_on_a_file_system_without_locks(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(_descriptor: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    abandoned = temporary / "harmonia-nars-1"
    abandoned.mkdir()
    with scratch.directory() as path:
        assert {*temporary.iterdir()} == {abandoned, Path(path)}
    assert [*temporary.iterdir()] == [abandoned]


@pytest.mark.root
def test_directories_of_others_and_symlinks_stay(temporary: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = temporary / "harmonia-nars-other"
    other.mkdir()
    os.chown(other, 65534, 65534)
    target = tmp_path_factory.mktemp("target")
    (temporary / "harmonia-nars-link").symlink_to(target)
    with scratch.directory():
        assert len(list(temporary.iterdir())) == 3
    assert target.exists()

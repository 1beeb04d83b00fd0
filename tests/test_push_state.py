"""`push.state_dir` must be usable when the server starts: otherwise, each push would fail after its NAR was sent."""

import subprocess
from pathlib import Path

import pytest

from harmonia.config.tokens import new
from harmonia.tools.store_builder import StoreBuilder
from support.running import run
from support.small_disk import mounted


def start(directory: Path, state_dir: Path) -> str:
    """Start a server that must not start, and return its message."""
    store = StoreBuilder(directory / "store")
    store.add_text("one", b"one")
    (directory / "tokens").write_text(str(new("ci", ["push"])[1]))
    (directory / "harmonia.toml").write_text(
        f"bind = '127.0.0.1:0'\nreal_nix_store = '{store.real_dir}'\nnix_db_path = '{store.db_path}'\n"
        f"cache_dir = '{directory}/cache'\ntokens_path = '{directory}/tokens'\n"
        f"[push]\nenable = true\nallow_without_tls = true\nstate_dir = '{state_dir}'\n"
    )
    answer = run("--config", str(directory / "harmonia.toml"))
    assert answer.returncode == 2
    assert answer.stderr.count("\n") == 1
    return answer.stderr


def test_state_dir_that_cannot_be_created_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = start(tmp_path, tmp_path / "file")
    assert f"cannot create '{tmp_path}/file/push-roots' for pushes: Not a directory" in message


@pytest.mark.root
def test_state_dir_on_a_read_only_disk_stops_the_start(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk") as disk:
        (disk / "push-roots").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert "make cache_dir and push.state_dir writable" in start(tmp_path, disk)

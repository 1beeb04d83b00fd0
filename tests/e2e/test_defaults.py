"""Without any configuration, the store of the machine is served."""

import subprocess
from pathlib import Path

import pytest

from support.closure import Closure
from support.running import HARMONIA, PATIENCE_S

# A minimal machine: its own /nix, and port 5000 on its own loopback interface.
_SCRIPT = """
mkdir -p /nix && mount --bind "$1" /nix && ip link set lo up
shift
"$@" 2> "$LOG" &
until curl --silent --fail http://localhost:5000/health > /dev/null; do kill -0 $! || exit; sleep 0.1; done
curl --silent --fail "http://localhost:5000/$HASH.narinfo"
kill $! && wait $!
"""


@pytest.mark.nix
@pytest.mark.root
def test_store_of_the_machine_is_served_without_configuration(closure: Closure, tmp_path: Path) -> None:
    nix = str(closure.server.directory / "nix")
    command = ["unshare", "--mount", "--net", "sh", "-c", _SCRIPT, "sh", nix, *HARMONIA]
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(tmp_path),
        "LOG": str(tmp_path / "log"),
        "HASH": closure.top.removeprefix("/nix/store/")[:32],
    }
    answer = subprocess.run(
        command, env=environment, cwd=Path.cwd(), capture_output=True, timeout=PATIENCE_S, check=False
    )
    assert answer.returncode == 0, (tmp_path / "log").read_text()
    assert f"StorePath: {closure.top}\n" in answer.stdout.decode()

"""The shared code of the tests: where it lives, and that it fails when a test does not test anything any longer."""

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from support.programs import skips
from support.running import patched

TESTS = Path(__file__).parent


def test_no_test_file_or_conftest_is_imported() -> None:
    pattern = r"(?m)^\s*(?:from|import) +((?:[\w.]+\.)?(?:test_\w+|conftest)\b.*)"
    found = {path.relative_to(TESTS): re.findall(pattern, path.read_text()) for path in TESTS.rglob("*.py")}
    assert not {path: names for path, names in found.items() if names}, "move shared code to tests/support"


@pytest.mark.parametrize(
    "statements",
    [
        "from harmonia.server import worker\nworker._NO_SUCH_CONSTANT = 1",
        "import harmonia.server.worker\nharmonia.server.worker._NO_SUCH_CONSTANT = 1",
        "from harmonia.server import worker; worker.run = worker._NO_SUCH_CONSTANT = None",
        "from harmonia.server import worker; worker.run, worker._NO_SUCH_CONSTANT = None, None",
        "from harmonia.server import worker\nif True:\n  worker._NO_SUCH_CONSTANT = 1",
        "from harmonia.process.supervisor import Supervisor\nSupervisor._no_such_method = lambda self: None",
    ],
)
def test_a_patch_of_a_missing_name_fails(statements: str) -> None:
    done = subprocess.run([*patched(statements), "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "AttributeError" in done.stderr
    assert "_no_such_" in done.stderr.lower()


def test_a_patch_of_an_existing_name_changes_the_program() -> None:
    command = [*patched("from harmonia.cli import main; main.help = 'another help'"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "another help" in done.stdout) == (0, True)


def test_skipped_tests_are_summed_up_in_one_line() -> None:
    nix = "no nix-store on this machine: apt-get install nix-bin"
    reasons = Counter({nix: 37, "no curl on this machine: apt-get install curl": 2, "not root: run as root": 5})
    assert skips(reasons) == (
        "44 tests skipped: 37 no nix-store on this machine, 5 not root, 2 no curl on this machine; "
        "to run them: apt-get install curl nix-bin; run as root"
    )
    assert skips(Counter({"Nix presents certificates from 2.34 on": 1})) == (
        "1 test skipped: 1 Nix presents certificates from 2.34 on"
    )

"""The shared code of the tests is in tests/support, and its helpers fail if a test would test nothing."""

import os
import re
import signal
import subprocess
import threading
from collections import Counter
from pathlib import Path

import pytest

from support.preloaded import HARMONIA, NOT_PRELOADED, popen
from support.programs import skips
from support.running import PATIENCE_S, Sample, Server, open_files, patched

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
def test_patch_of_a_missing_name_fails(statements: str) -> None:
    with popen([*patched(statements), "--version"], env=os.environ, stderr=subprocess.PIPE, text=True) as process:
        _, stderr = process.communicate()
    assert process.returncode == 1
    assert "AttributeError" in stderr
    assert "_no_such_" in stderr.lower()


@pytest.mark.parametrize("is_preloaded", [True, False])
def test_patch_of_an_existing_name_changes_the_program(*, is_preloaded: bool) -> None:
    command = [*patched("from harmonia.cli import main; main.help = 'another help'"), "--help"]
    program = command if is_preloaded else ["env", *command]
    with popen(program, env=os.environ, stdout=subprocess.PIPE, text=True) as process:
        stdout, _ = process.communicate()
    assert (process.returncode, "another help" in stdout) == (0, True)
    assert (type(process) is not subprocess.Popen) == is_preloaded


def test_log_has_all_that_the_server_wrote_although_the_thread_that_reads_it_is_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(tmp_path / "server", Sample.make(tmp_path / "store").root, "unknown = 1")
    monkeypatch.setattr(threading.Thread, "start", lambda _: None)
    monkeypatch.setattr(threading.Thread, "join", lambda _: None)
    server.launch()
    assert server.process.wait(PATIENCE_S) == 2
    assert server.wait_for_log("unknown key")
    server.wait()


def test_skipped_tests_are_summarized_in_one_line() -> None:
    nix = "no nix-store on this machine: apt-get install nix-bin"
    reasons = Counter({nix: 37, "no curl on this machine: apt-get install curl": 2, "not root: run as root": 5})
    assert skips(reasons) == (
        "44 tests skipped: 37 no nix-store on this machine, 5 not root, 2 no curl on this machine; "
        "to run them: apt-get install curl nix-bin; run as root"
    )
    assert skips(Counter({"Nix presents certificates from 2.34 on": 1})) == (
        "1 test skipped: 1 Nix presents certificates from 2.34 on"
    )


@pytest.mark.parametrize("arguments", [["--version"], ["no-such-command"], ["check-config"], ["nar", "list", "none"]])
def test_preloaded_command_behaves_like_a_new_process(arguments: list[str], tmp_path: Path) -> None:
    def outcome(program: list[str]) -> tuple[int, str, str]:
        (tmp_path / "harmonia.toml").write_text("priority = 77\n")
        environment = {**os.environ, "CONFIG_FILE": "harmonia.toml", "HOME": str(tmp_path)}
        pipe = subprocess.PIPE
        command = [*program, *arguments]
        with popen(command, env=environment, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True) as process:
            stdout, stderr = process.communicate()
        return process.returncode, stdout, re.sub(r"(?m)^[\d-]+[T ][\d:.,+]+", "", stderr)

    assert outcome(HARMONIA) == outcome(NOT_PRELOADED)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_preloaded_server_is_a_process_like_a_new_one(tmp_path: Path, number: int) -> None:
    sample = Sample.make(tmp_path / "store", 1)

    def facts(name: str, program: list[str]) -> list[object]:
        server = Server(tmp_path / name, sample.root, program=program, start_new_session=True)
        server.start()
        pid = server.process.pid
        stat, status, limits = (Path(f"/proc/{pid}/{name}").read_text() for name in ("stat", "status", "limits"))
        return [
            int(stat.split()[3]) == os.getpid(),
            [os.getsid(each) == pid for each in (pid, *server.workers)],
            re.findall(r"(?m)^((?:Umask|Threads|NoNewPrivs|Sig(?:Blk|Ign|Cgt)|Cap\w+):.*)$", status),
            limits,
            sorted(re.sub(r"\d+|/.*", "", file) for file in open_files(pid)),
            server.stop(number),
        ]

    assert facts("preloaded", HARMONIA) == facts("new", NOT_PRELOADED)


def test_python_variables_need_a_new_process() -> None:
    environment = {**os.environ, "PYTHONOPTIMIZE": "1"}
    with popen([*HARMONIA, "--version"], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert type(process) is subprocess.Popen
    with popen([*HARMONIA, "--version"], env=os.environ, stdout=subprocess.PIPE, text=True) as process:
        assert type(process) is not subprocess.Popen

"""The driver of the NixOS tests waits for a machine, in whatever order its processes start."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from container import Container
from machine import Addresses, Machine, MachineError

ADDRESSES = Addresses("192.168.1.1", "2001:db8:1::1")


@pytest.fixture
def starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Container]:
    """Start a machine whose first process has short-lived children, and then one named systemd."""
    shutil.copy("/bin/sleep", tmp_path / "systemd")
    script = tmp_path / "container.sh"
    script.write_text(f"for _ in $(seq 50); do env true; done; setpriv --pdeathsig KILL {tmp_path}/systemd 60; exit 1")
    monkeypatch.setattr("container._BOOT", script)
    machine = Container("server", ADDRESSES, tmp_path, tmp_path / "state", root=tmp_path, cgroup=tmp_path)
    machine.start()
    yield machine
    machine.release()


def test_process_1_is_found_behind_short_lived_processes(starting: Container) -> None:
    while not starting._is_process_1_systemd():  # noqa: SLF001 (a private part is tested)
        pass
    assert Path(f"/proc/{starting._init}/comm").read_text() == "systemd\n"  # noqa: SLF001 (a private part is tested)


class Scripted(Machine):
    """A machine with a unit whose job takes `delay` queries to finish."""

    def __init__(self, state: Path, delay: int, *, outcome: str) -> None:
        super().__init__("server", ADDRESSES, state, state / "server")
        self.delay = delay
        self.outcome = outcome

    def boot(self) -> None: ...

    def wait_for_shell(self) -> None: ...

    def release(self) -> None: ...

    def shell(self, command: str) -> tuple[int, bytes]:
        self.delay -= 1
        if "list-jobs" in command:
            return 0, b"No jobs running." if self.delay < 0 else b"1 harmonia.service start running"
        return 0, b"inactive" if self.delay >= 0 else self.outcome.encode()


@pytest.mark.parametrize("delay", range(4))
class TestWaitForUnit:
    def test_unit_started_at_any_moment_is_waited_for(self, tmp_path: Path, delay: int) -> None:
        Scripted(tmp_path, delay, outcome="active").wait_for_unit("harmonia.service")

    @pytest.mark.parametrize("outcome", ["failed", "inactive"])
    def test_unit_that_failed_or_never_starts_raises(self, tmp_path: Path, delay: int, outcome: str) -> None:
        with pytest.raises(MachineError, match=outcome):
            Scripted(tmp_path, delay, outcome=outcome).wait_for_unit("harmonia.service")

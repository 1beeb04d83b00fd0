"""Base class of test machines: the part of the `Machine` of the NixOS test driver that our tests use.

Names, arguments and meaning are those of nixos/lib/test-driver in nixpkgs, so the same script runs in both. The
subclasses in container.py and qemu.py start a machine and run its commands.
"""

import shlex
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

# PATH of the test shell of NixOS, then of Debian.
PATH = "/run/wrappers/bin:/run/current-system/sw/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DEFAULT_TIMEOUT = 900
BOOT_TIMEOUT = 240
_BEGIN = time.monotonic()


class Addresses(NamedTuple):
    v4: str
    v6: str

    def add(self, interface: str) -> Iterator[str]:
        """Yield the commands that add the addresses to an interface."""
        yield f"ip addr add {self.v4}/24 dev {interface}"
        yield f"ip addr add {self.v6}/64 dev {interface} nodad"


class MachineError(Exception):
    """A machine did not do what the script expects."""


def log(message: str) -> None:
    print(f"[{time.monotonic() - _BEGIN:7.2f}] {message}", flush=True)


@contextmanager
def subtest(name: str) -> Iterator[None]:
    log(f"subtest: {name}")
    yield


def retry(attempt: Callable[[], bool], timeout: float, what: str) -> None:
    deadline = time.monotonic() + timeout
    while not attempt():
        if time.monotonic() > deadline:
            raise MachineError(f"{what}: timeout after {timeout} s")
        time.sleep(0.1)


class Machine(ABC):
    """Machine of a test. `guest` is the directory of pack.py for the test, `state` a new directory for the machine."""

    def __init__(self, name: str, addresses: Addresses, guest: Path, state: Path) -> None:
        self.name = name
        self.addresses = addresses
        self.guest = guest
        self.state = state
        self.started = False
        self.has_shell = False
        state.mkdir()

    @abstractmethod
    def boot(self) -> None:
        """Start booting, without waiting."""

    @abstractmethod
    def wait_for_shell(self) -> None:
        """Wait until `shell` works and the network is up."""

    @abstractmethod
    def shell(self, command: str) -> tuple[int, bytes]:
        """Run a command in bash. Return its exit status and output."""

    @abstractmethod
    def release(self) -> None:
        """Stop the machine, in any state."""

    def log(self, message: str) -> None:
        log(f"{self.name}: {message}")

    def start(self) -> None:
        if not self.started:
            self.started = True
            self.log("starting")
            self.boot()

    def set_up(self) -> None:
        """Wait until the machine runs, then apply the evaluated NixOS configuration."""
        self.start()
        self.wait_for_shell()
        self.has_shell = True
        self.execute(
            "systemctl is-system-running --wait", timeout=BOOT_TIMEOUT
        )  # avoids a race of the set-up with the boot
        status, output = self.shell(f"bash /run/guest/{self.guest.name}/{self.name}/setup.sh 2>&1")
        if status != 0:
            raise MachineError(f"{self.name}: set-up failed: {output.decode(errors='replace')}")
        self.log("is set up")

    def execute(self, command: str, timeout: int | None = DEFAULT_TIMEOUT) -> tuple[int, str]:
        limit = "" if timeout is None else f"timeout {timeout} "
        status, output = self.shell(f"{limit}bash -c {shlex.quote(f'set -euo pipefail; {command}')}")
        return status, output.decode(errors="replace")

    def succeed(self, *commands: str, timeout: int | None = DEFAULT_TIMEOUT) -> str:
        return "".join(self._expect(command, timeout, success=True) for command in commands)

    def fail(self, *commands: str, timeout: int | None = DEFAULT_TIMEOUT) -> str:
        return "".join(self._expect(command, timeout, success=False) for command in commands)

    def _expect(self, command: str, timeout: int | None, *, success: bool) -> str:
        self.log(f"must {'succeed' if success else 'fail'}: {command}")
        status, output = self.execute(command, timeout)
        if (status == 0) != success:
            raise MachineError(f"{self.name}: `{command}` exited with status {status}:\n{output}")
        return output

    def wait_until_succeeds(self, command: str, timeout: int = DEFAULT_TIMEOUT) -> str:
        return self._wait(command, timeout, success=True)

    def wait_until_fails(self, command: str, timeout: int = DEFAULT_TIMEOUT) -> str:
        return self._wait(command, timeout, success=False)

    def _wait(self, command: str, timeout: int, *, success: bool) -> str:
        output = ""

        def attempt() -> bool:
            nonlocal output
            status, output = self.execute(command, timeout)
            return (status == 0) == success

        self.log(f"waiting until the command {'succeeds' if success else 'fails'}: {command}")
        retry(attempt, timeout, f"{self.name}: `{command}`")
        return output

    def wait_for_open_port(self, port: int, addr: str = "localhost", timeout: int = DEFAULT_TIMEOUT) -> None:
        self.wait_until_succeeds(f"nc -z {addr} {port}", timeout)

    def wait_for_file(self, filename: str, timeout: int = DEFAULT_TIMEOUT) -> None:
        self.wait_until_succeeds(f"test -e {filename}", timeout)

    def systemctl(self, query: str) -> tuple[int, str]:
        return self.execute(f"systemctl {query}")

    def get_unit_info(self, unit: str) -> dict[str, str]:
        shown = self.succeed(f"systemctl --no-pager show {shlex.quote(unit)}")
        return dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)

    def get_unit_property(self, unit: str, name: str) -> str:
        return self.get_unit_info(unit)[name]

    def require_unit_state(self, unit: str, state: str = "active") -> None:
        found = self.get_unit_property(unit, "ActiveState")
        if found != state:
            raise MachineError(f"{self.name}: {unit} is {found}, not {state}")

    def wait_for_unit(self, unit: str, timeout: int = DEFAULT_TIMEOUT) -> None:
        def attempt() -> bool:
            # Read the jobs first: a job that ends meanwhile has then started the unit when we read its state.
            jobs = self.execute("systemctl list-jobs --full 2>&1")[1]
            state = self.execute(f"systemctl show --value --property=ActiveState {shlex.quote(unit)}")[1].strip()
            if state == "failed" or (state == "inactive" and "No jobs" in jobs):
                raise MachineError(f"{self.name}: {unit} is {state}, and nothing will start it")
            return state == "active"

        self.log(f"waiting for unit {unit}")
        retry(attempt, timeout, f"{self.name}: unit {unit}")

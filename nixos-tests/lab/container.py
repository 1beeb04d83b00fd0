"""Machine in a container of this machine: boots in a second, and runs at full speed."""

import subprocess
from contextlib import suppress
from pathlib import Path

from machine import BOOT_TIMEOUT, PATH, Addresses, Machine, MachineError, retry

_BOOT = Path(__file__).with_name("container.sh")


def make_network() -> None:
    """Create a bridge in our own network namespace, which connects the machines."""
    for command in ("ip link add machines type bridge", "ip link set machines up"):
        subprocess.run(command.split(), check=True)


class Container(Machine):
    def __init__(self, name: str, addresses: Addresses, guest: Path, state: Path, *, root: Path, cgroup: Path) -> None:
        super().__init__(name, addresses, guest, state)
        self._root = root
        self._cgroup = cgroup

    def boot(self) -> None:
        (self.state / "console").touch()
        arguments = (self.name, self._root, self.state, self.guest.parent, self._cgroup)
        self._process = subprocess.Popen(["sh", _BOOT, *arguments], stdin=subprocess.DEVNULL)

    def wait_for_shell(self) -> None:
        retry(self._is_process_1_systemd, BOOT_TIMEOUT, f"{self.name}: systemd")
        inside = f"nsenter --target {self._init} --net"
        for command in (
            f"ip link add {self.name} type veth peer name eth1 netns {self._init}",
            f"ip link set {self.name} master machines up",
            f"{inside} ip link set lo up",
            f"{inside} ip link set eth1 up",
            *(f"{inside} {command}" for command in self.addresses.add("eth1")),
        ):
            subprocess.run(command.split(), check=True)
        retry(self._does_systemd_answer, BOOT_TIMEOUT, f"{self.name}: systemd's socket")

    def _require_alive(self) -> None:
        if self._process.poll() is not None:
            raise MachineError(f"{self.name}: did not start: {(self.state / 'console').read_text()}")

    def _is_process_1_systemd(self) -> bool:
        self._require_alive()
        # Until unshare has forked, children are commands of container.sh, which may exit before we read their names.
        for child in Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split():
            with suppress(FileNotFoundError, ProcessLookupError):
                if Path(f"/proc/{child}/comm").read_text() == "systemd\n":
                    self._init = int(child)
                    return True
        return False

    def _does_systemd_answer(self) -> bool:
        self._require_alive()
        return self.shell("systemctl show --property=Version 2>&1")[0] == 0  # its socket exists before it answers

    def shell(self, command: str) -> tuple[int, bytes]:
        enter = [
            "nsenter",
            "--target",
            str(self._init),
            "--all",
            "env",
            "-i",
            "HOME=/root",
            "USER=root",
            f"PATH={PATH}",
        ]
        done = subprocess.run(
            [*enter, "bash", "-c", f"cd /tmp; {command}"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False
        )
        return done.returncode, done.stdout

    def release(self) -> None:
        if not self.started:
            return
        self._process.kill()  # --kill-child then kills process 1, and with it all processes of the machine
        self._process.wait()

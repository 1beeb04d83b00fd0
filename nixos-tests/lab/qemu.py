"""Machine in QEMU with its own kernel. Uses software emulation: ten times slower, but needs no /dev/kvm."""

import base64
import socket
import subprocess
from pathlib import Path

from machine import BOOT_TIMEOUT, PATH, Addresses, Machine, MachineError

MEMORY = "1024"  # MiB
# The oldest processor that the wheels support. QEMU's default is a processor of 2003.
PROCESSOR = "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+rdrand"
# A hub: all machines of a driver receive the packets to this multicast address on its loopback interface.
HUB = "socket,id=hub,mcast=230.0.0.1:2300,localaddr=127.0.0.1"


def make_network() -> None:
    subprocess.run(("ip", "link", "set", "lo", "up"), check=True)


def make_disk(directory: Path, image: Path, size: str) -> None:
    """Create an image of an ext4 file system with the content of the directory."""
    image.touch()  # otherwise mke2fs prints a message
    subprocess.run(("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", directory, image, size), check=True)


class VirtualMachine(Machine):
    """Virtual machine with the kernel of `root`. `disk` is an image of `root`, `packed` one of pack.py's output."""

    def __init__(
        self, name: str, addresses: Addresses, guest: Path, state: Path, *, root: Path, disk: Path, packed: Path
    ) -> None:
        super().__init__(name, addresses, guest, state)
        self._kernel, self._initrd = next(root.glob("boot/vmlinuz-*")), next(root.glob("boot/initrd.img-*"))
        self._disks = (disk, packed)

    def boot(self) -> None:
        shell = self.state / "shell"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(shell))
        listener.listen(1)
        append = f"console=ttyS0 root=/dev/vda rw panic=1 net.ifnames=0 mitigations=off systemd.hostname={self.name}"
        number = int(self.addresses.v4.rpartition(".")[2])
        # snapshot=on: writes go to an unnamed temporary file.
        disks = [word for disk in self._disks for word in ("-drive", f"file={disk},if=virtio,format=raw,snapshot=on")]
        command = [
            *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", PROCESSOR, "-m", MEMORY),
            *("-nodefaults", "-display", "none", "-no-reboot", "-device", "virtio-rng-pci"),
            *("-kernel", str(self._kernel), "-initrd", str(self._initrd), "-append", append, *disks),
            *("-netdev", HUB, "-device", f"virtio-net-pci,netdev=hub,romfile=,mac=52:54:00:12:01:{number:02x}"),
            *("-serial", f"file:{self.state / 'console'}", "-serial", f"unix:{shell}"),
        ]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        listener.settimeout(BOOT_TIMEOUT)
        connection, _ = listener.accept()
        listener.close()
        self._connection = connection
        self._answers = connection.makefile("rb")

    def wait_for_shell(self) -> None:
        self._connection.settimeout(BOOT_TIMEOUT)
        try:
            while (line := self._answers.readline()).strip() != b"ready":
                if not line:
                    raise MachineError(f"{self.name}: QEMU ended")
        except TimeoutError:
            console = (self.state / "console").read_text(errors="replace")
            raise MachineError(f"{self.name}: no shell in {BOOT_TIMEOUT} s:\n{console}") from None
        self._connection.settimeout(None)
        up = " && ".join(("mkdir -p /run/guest", "mount -o ro /dev/vdb /run/guest", *self.addresses.add("eth0")))
        status, output = self.shell(
            f"(until ip link set eth0 up; do ((++tries < 300)) || exit; sleep 0.2; done && {up}) 2>&1"
        )
        if status != 0:
            raise MachineError(f"{self.name}: no network: {output.decode(errors='replace')}")

    def shell(self, command: str) -> tuple[int, bytes]:
        line = base64.b64encode(f"export PATH={PATH}; {command}".encode())
        self._connection.sendall(line + b"\n")
        answer = self._answers.readline()
        if not answer:
            raise MachineError(f"{self.name}: QEMU ended")
        output, _, status = answer.rpartition(b" ")
        return int(status), base64.b64decode(output)

    def release(self) -> None:
        if self.started:
            self._process.kill()
            self._process.wait()

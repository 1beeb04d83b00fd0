"""Driver of a NixOS test between Debian machines.

In containers: driver.py GUEST --root DIR [--root MACHINE=DIR] --cgroup DIR
In QEMU: driver.py GUEST --root DIR --disk IMAGE --packed IMAGE

GUEST is the directory that pack.py made for the test. Every machine has the root file system DIR, unless MACHINE=DIR
names another one. run.py starts the driver in new mount, network and process namespaces, which end with it.
"""

import argparse
import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from types import FrameType
from typing import NoReturn

import container
import qemu
from container import Container
from machine import Addresses, Machine, MachineError, log, subtest
from qemu import VirtualMachine

TIMEOUT = 600


def containers(options: argparse.Namespace, addresses: dict[str, Addresses], scratch: Path) -> list[Machine]:
    container.make_network()
    roots = {name: Path(path) for name, _, path in (root.rpartition("=") for root in options.root)}
    return [
        Container(
            name, each, options.guest, scratch / name, root=roots.get(name, roots[""]), cgroup=options.cgroup / name
        )
        for name, each in addresses.items()
    ]


def virtual_machines(options: argparse.Namespace, addresses: dict[str, Addresses], scratch: Path) -> list[Machine]:
    qemu.make_network()
    root = Path(options.root[0])
    return [
        VirtualMachine(name, each, options.guest, scratch / name, root=root, disk=options.disk, packed=options.packed)
        for name, each in addresses.items()
    ]


def run(script: Path, machines: list[Machine]) -> None:
    def start_all() -> None:
        for machine in machines:
            machine.start()

    with ThreadPoolExecutor() as threads:
        list(threads.map(Machine.set_up, machines))
    names = {machine.name.replace("-", "_"): machine for machine in machines}
    exec(compile(script.read_text(), script, "exec"), names | {"start_all": start_all, "subtest": subtest})


def explain(machine: Machine) -> None:
    """Print failed units and the end of the journal of a machine after a failure."""
    if not machine.has_shell:
        return
    signal.alarm(60)
    with suppress(OSError, MachineError):  # if the shell itself failed
        _, journal = machine.execute("systemctl --failed --no-legend; journalctl --no-pager --lines=80", timeout=20)
        machine.log(f"end of the journal:\n{journal}")


def stop(signal_number: int, _frame: FrameType | None) -> NoReturn:
    raise MachineError(f"timeout after {TIMEOUT} s" if signal_number == signal.SIGALRM else "interrupted")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("guest", type=Path)
    parser.add_argument("--cgroup", type=Path)
    parser.add_argument("--disk", type=Path)
    parser.add_argument("--packed", type=Path)
    parser.add_argument("--root", action="append", default=[])
    options = parser.parse_args()
    for number in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    signal.alarm(TIMEOUT)
    scratch = Path(mkdtemp())
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", scratch], check=True)
    machines = json.loads((options.guest / "machines.json").read_text())
    addresses = {name: Addresses(**each) for name, each in machines.items()}
    started = (virtual_machines if options.disk else containers)(options, addresses, scratch)
    try:
        run(options.guest / "test.py", started)
    except Exception as error:  # noqa: BLE001 - any error of the script fails the test
        log(f"{type(error).__name__}: {error}")
        for machine in started:
            explain(machine)
        return 1
    finally:
        for machine in started:
            machine.release()
    return 0


if __name__ == "__main__":
    sys.exit(main())

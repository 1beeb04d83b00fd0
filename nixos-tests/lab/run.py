"""Runner of the NixOS tests on Debian: run.py [TEST...], as root.

docs/reference/nixos-tests.md describes what the tests prove.

The Debian root file systems are created once and kept. Real Nix evaluates and builds the package and the machines'
configurations. Then each test runs between containers or virtual machines. Everything runs in namespaces that the
kernel removes with their first process, so nothing stays behind, even after a crash.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from qemu import make_disk

LAB = Path(__file__).parent.resolve()
PROJECT = LAB.parent.parent
TOOLS = ("ip", "mmdebstrap", "nsenter", "setpriv", "unshare")
# Debian release of the machines, Python of each release, and releases of clients with an older or newer Nix.
SUITE = "trixie"
PYTHONS = {SUITE: "3.13", "bookworm": "3.11"}
OTHER_CLIENTS = {"basic": ("bookworm", "sid"), "ca-derivations": ("sid",)}
WITH_KERNEL = f"{SUITE}+kernel"
IN_QEMU = ("basic", "hardening")
WITHOUT_NIXOS = "debian"
WITH_S3 = "mirror"
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_28_x86_64")

NAMESPACES = ("--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


class Run(NamedTuple):
    test: str
    root: str = SUITE
    client: str = SUITE

    @property
    def name(self) -> str:
        if self.root == WITH_KERNEL:
            return f"{self.test}, in QEMU"
        if self.test == WITHOUT_NIXOS:
            return f"{self.test}: {self.root}"
        return self.test if self.client == self.root else f"{self.test}, client of {self.client}"


def contained(*command: str | Path, network: bool = False, output: IO[bytes] | None = None) -> bool:
    """Run a command in new namespaces. Return True if it succeeded."""
    namespaces = NAMESPACES if network else (*NAMESPACES, "--net")
    enter = ("setpriv", "--pdeathsig", "KILL", "unshare", *namespaces)
    return subprocess.run((*enter, *command), check=False, stdout=output, stderr=output).returncode == 0


@contextmanager
def cgroup() -> Iterator[Path]:
    """Create a cgroup (version 2) for the machines, and remove it at the end."""
    mounts = (line.split() for line in Path("/proc/mounts").read_text().splitlines())
    tree = next((Path(where) for _, where, kind, *_ in mounts if kind == "cgroup2"), None)
    if tree is None:
        sys.exit("no cgroups of version 2 are mounted; mount them at /sys/fs/cgroup")
    path = tree / f"harmonia-{os.getpid()}"
    try:
        path.mkdir()
    except OSError as error:
        sys.exit(f"cannot create the cgroup {path}: {error.strerror}; mount the cgroups writable")
    try:
        yield path
    finally:
        deadline = time.monotonic() + 10
        while path.exists() and time.monotonic() < deadline:  # killed processes take a moment to exit
            for directory, _, _ in os.walk(path, topdown=False):
                with suppress(OSError):
                    os.rmdir(directory)


def make_roots(suites: set[str]) -> Path:
    """Create missing root file systems. Return their directory, which depends on the script that creates them."""
    script = LAB / "make-roots.sh"
    version = hashlib.sha256(script.read_bytes()).hexdigest()[:8]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "harmonia")
    roots = cache / f"machines-{version}"
    if not contained("sh", script, roots, *sorted(suites), network=True):
        sys.exit(f"{script}: failed")
    return roots


def make_wheels(wheels: Path, suite: str, *more: str) -> None:
    """Build the package, and download its dependencies and `more` for the Python of that Debian release."""
    subprocess.run((*PIP, "wheel", "--no-deps", "--wheel-dir", wheels, PROJECT), check=True)
    download(wheels, suite, *wheels.glob("*.whl"), *more)


def download(wheels: Path, suite: str, *packages: str | Path) -> None:
    """Download packages and their dependencies for the Python of that Debian release."""
    platforms = (f"--platform={platform}" for platform in PLATFORMS)
    target = ("--only-binary=:all:", f"--python-version={PYTHONS[suite]}", *platforms)
    subprocess.run((*PIP, "download", *target, "--dest", wheels, *packages), check=True)


def make_nixos_wheels(wheels: Path, *, with_s3: bool) -> None:
    """Build the package for the machines, and with S3 also the service, in a directory of its own."""
    make_wheels(wheels, SUITE, *(extra("s3") if with_s3 else ()))
    if with_s3:
        download(wheels / "engine", SUITE, *extra("s3-engine"))


def extra(name: str) -> list[str]:
    """Return the requirements of an optional feature of the package."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    requirements: list[str] = project["optional-dependencies"][name]
    return requirements


def make_debian(guest: Path) -> None:
    """Prepare the machines of debian.py: no NixOS, but this repository and the packages that pip would download."""
    for suite in PYTHONS:
        make_wheels(guest / "wheels" / suite, suite, "hatchling")
    for name in ("docs", "harmonia"):
        shutil.copytree(PROJECT / name, guest / "project" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(PROJECT / name, guest / "project")
    machines = {
        "client": {"v4": "192.168.1.1", "v6": "2001:db8:1::1"},
        "server": {"v4": "192.168.1.2", "v6": "2001:db8:1::2"},
    }
    (guest / "machines.json").write_text(json.dumps(machines))
    hosts = "127.0.0.1 localhost\n::1 localhost\n"  # a minimal root file system lacks these lines
    hosts += "".join(f"{address} {name}\n" for name, each in machines.items() for address in each.values())
    for name in machines:
        (guest / name).mkdir()
        (guest / name / "setup.sh").write_text(f"cat >>/etc/hosts <<END\n{hosts}END\n")
    shutil.copy(LAB / "debian.py", guest / "test.py")


def run(each: Run, roots: Path, out: Path, cgroup: Path, log: Path) -> bool:
    guest = out / "guests" / f"harmonia-{each.test}"
    driver = (sys.executable, LAB / "driver.py", guest, f"--root={roots / each.root}")
    if each.root == WITH_KERNEL:
        special = (f"--disk={out / 'disk'}", f"--packed={out / 'packed'}")
    else:
        special = (f"--root=client={roots / each.client}", f"--cgroup={cgroup / log.name}")
    with log.open("wb") as output:
        return contained(*driver, *special, output=output)


def show(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the NixOS tests between containers.")
    parser.add_argument("tests", nargs="*", help="tests to run (default: all)")
    parser.add_argument(
        "--qemu", action="store_true", help=f"run these in virtual machines as well: {', '.join(IN_QEMU)}"
    )
    parser.add_argument("--logs", type=Path, help="keep the output of the tests in this directory")
    options = parser.parse_args()
    tests = options.tests or [*sorted(path.stem for path in LAB.parent.glob("*.nix")), WITHOUT_NIXOS]
    on_nixos = [test for test in tests if test != WITHOUT_NIXOS]
    runs = [Run(test, client=client) for test in on_nixos for client in (SUITE, *OTHER_CLIENTS.get(test, ()))]
    if WITHOUT_NIXOS in tests:
        runs += [Run(WITHOUT_NIXOS, root=suite, client=suite) for suite in PYTHONS]
    if options.qemu:
        runs += [Run(test, root=WITH_KERNEL) for test in IN_QEMU if test in tests]
    if os.geteuid() != 0:
        sys.exit("creating containers and root file systems needs root; run this as root")
    tools = (*TOOLS, "qemu-system-x86_64", "mke2fs") if options.qemu else TOOLS
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        sys.exit(f"not installed: {', '.join(missing)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    failed = []
    with tempfile.TemporaryDirectory(prefix="harmonia-machines-") as scratch, cgroup() as group:
        out = Path(scratch)
        begin = time.monotonic()
        roots = make_roots({suite for each in runs for suite in (each.root, each.client)})
        show(f"{'root file systems':34} {'ready':7} {time.monotonic() - begin:6.1f} s")
        os.environ["TMPDIR"] = scratch
        begin = time.monotonic()
        make_nixos_wheels(out / "wheels", with_s3=WITH_S3 in tests)
        if on_nixos and not contained("sh", LAB / "build.sh", roots / SUITE, PROJECT, out, *on_nixos):
            return 1
        if WITHOUT_NIXOS in tests:
            make_debian(out / "guests" / f"harmonia-{WITHOUT_NIXOS}")
        if options.qemu:
            make_disk(roots / WITH_KERNEL, out / "disk", "3G")
            make_disk(out / "guests", out / "packed", "3G")
        show(f"{'package and machines':34} {'built':7} {time.monotonic() - begin:6.1f} s")
        for number, each in enumerate(runs):
            begin = time.monotonic()
            log = (options.logs or out) / f"{number:02}-{each.test}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            passed = run(each, roots, out, group, log)
            if not passed:
                failed.append(each.name)
                show(log.read_text(errors="replace"))
            show(f"{each.name:34} {'passed' if passed else 'FAILED':7} {time.monotonic() - begin:6.1f} s")
    show(f"FAILED: {', '.join(failed)}" if failed else "all passed")
    return int(bool(failed))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)

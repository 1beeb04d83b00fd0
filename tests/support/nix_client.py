"""Real Nix clients, each on its own small machine.

A `Client` is a directory that looks like the root of a machine: its own /nix, /root, /etc and /tmp, and /usr from the
root of its `Nix` (this machine, or a root made by newer-nix-roots.sh). Commands run there by chroot, in private mount
and PID namespaces. So the store directory is the real /nix/store, which signatures need. Nothing touches the host's
/nix, and clients share nothing. When a command ends or is killed, its mounts and processes are gone.

The server under test can serve the store of a client: `Client.store_dir` and `Client.db_path` are its paths outside.
"""

import os
import re
import shlex
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from support.programs import NAMESPACES, NOT_ROOT, missing, namespaces_forbidden

ROOTS = Path(
    os.environ.get("HARMONIA_NIX_ROOTS")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "harmonia", "nix-roots")
)
MAKE_ROOTS = "tests/e2e/newer-nix-roots.sh"

# Directories with programs: symlinks into usr if / and /usr are merged.
_PROGRAM_DIRS = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32")

# Arguments: the machine, the root of its programs, a directory to mount at its own path, and the command.
# The shell stays as process 1: it reaps orphans, and forwards signals to the command.
_ENTER = f"""
machine=$1 programs=$2 shared=$3; shift 3
for dir in {" ".join(_PROGRAM_DIRS)}; do
  [ -L "$machine/$dir" ] || [ ! -d "$machine/$dir" ] || mount --rbind "$programs/$dir" "$machine/$dir" || exit 125
done
mount --rbind /dev "$machine/dev" && mount -t proc proc "$machine/proc" && mount --bind "$shared" "$machine$shared" ||
  exit 125
chroot "$machine" "$@"
exit $?
"""

# A machine with only the user root, which resolves its own name without DNS.
_ETC = {
    "passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
    "group": "root:x:0:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost\n::1 localhost\n",
}

_SETTINGS = {
    "experimental-features": "nix-command ca-derivations",
    "require-sigs": "true",
    "substituters": "",
    "trusted-public-keys": "",
    # Build users do not exist, and nested namespaces may be forbidden.
    "build-users-group": "",
    "sandbox": "false",
}

# The client's first words: a constant, and version 1.37 of the protocol.
_HELLO = struct.pack("<QQ", 0x6E697863, 0x125)


@dataclass(frozen=True)
class Nix:
    """A version of Nix to test: `name` for messages, and the root directory with its programs in usr/bin."""

    name: str
    root: Path

    @property
    def missing(self) -> str | None:
        """Return the reason why this Nix cannot be used here, or None if it can."""
        if os.geteuid() != 0:
            return NOT_ROOT
        if reason := namespaces_forbidden():
            return reason
        if self.root != Path("/"):
            return None if self.root.is_dir() else f"no Nix of Debian {self.name} on this machine: {MAKE_ROOTS}"
        program = shutil.which("nix-store")
        if program is None:
            return missing("nix-store")
        if not Path(program).resolve().is_relative_to("/usr"):
            # A client's own /nix would hide a Nix that was installed by Nix.
            return "no nix-store of the distribution on this machine: apt-get install nix-bin"
        return None

    @cached_property
    def version(self) -> tuple[int, ...]:
        with tempfile.TemporaryDirectory() as scratch:
            banner = Client(self, Path(scratch, "machine")).run("nix", "--version").text
        numbers = re.fullmatch(r"nix \(Nix\) ([\d.]+).*", banner)
        assert numbers, banner
        return tuple(int(number) for number in numbers[1].split("."))


NIXES = tuple(
    Nix(name, root) for name, root in (("host", Path("/")), ("trixie", ROOTS / "trixie"), ("sid", ROOTS / "sid"))
)
OLD_NIX = Nix("bullseye", ROOTS / "bullseye")
"""Nix 2.3, for tests of its own: it has other commands, and cannot read zstd."""


@dataclass(frozen=True)
class Result:
    """The result of a command. stdout is bytes because it may be a NAR; `text` and `lines` are decoded."""

    returncode: int
    stdout: bytes
    stderr: str

    @property
    def text(self) -> str:
        return self.stdout.decode().strip()

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()


@dataclass(frozen=True)
class Key:
    """A signing key pair: the file of the secret key, and the public key as in trusted-public-keys."""

    secret_file: Path
    public: str


class Client:
    """A fresh machine in `directory` with an empty store.

    Its commands see the parent of `directory` at the same path, so files there can be passed by name.
    """

    def __init__(self, nix: Nix, directory: Path) -> None:
        self.nix = nix
        self.directory = directory
        self.shared = directory.parent
        self.settings = dict(_SETTINGS)  # of nix.conf; a test may change them between two commands
        self.store_dir = directory / "nix/store"
        self.db_path = directory / "nix/var/nix/db/db.sqlite"
        self.log_dir = directory / "nix/var/log/nix"
        for name in ("dev", "etc", "nix", "proc", "root", "tmp"):
            (directory / name).mkdir(parents=True)
        self._inside(self.shared).mkdir(parents=True, exist_ok=True)
        for name in _PROGRAM_DIRS:
            original = nix.root / name
            if original.is_symlink():
                (directory / name).symlink_to(original.readlink())
            elif original.is_dir():
                (directory / name).mkdir()
        for name, content in _ETC.items():
            (directory / "etc" / name).write_text(content)

    @property
    def environment(self) -> dict[str, str]:
        """Return the whole environment of a command; nothing is inherited."""
        return {
            "HOME": "/root",
            "LC_ALL": "C.UTF-8",
            "NIX_CONFIG": "".join(f"{name} = {value}\n" for name, value in self.settings.items()),
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        }

    def command(self, *command: str | Path) -> list[str]:
        """Return the command line that runs `command` on this machine, for subprocess.Popen with `environment`.

        End it with kill(): unshare does not forward SIGTERM, but kills all its processes when it dies.
        """
        enter = (*NAMESPACES, "sh", "-c", _ENTER, "sh", self.directory, self.nix.root, self.shared)
        return [os.fspath(word) for word in (*enter, *command)]

    def run(
        self,
        *command: str | Path,
        check: bool = True,
        stdin: bytes = b"",
        timeout: float = 120,
        environment: Mapping[str, str] | None = None,
    ) -> Result:
        """Run `command` on this machine. Raises an error with stderr if it fails, unless `check` is False.

        `environment` is added to the client's own. After `timeout` seconds, the command and its children are killed.
        """
        action = f"{shlex.join(map(str, command))} on {self.nix.name}'s Nix"
        try:
            done = subprocess.run(
                self.command(*command),
                check=False,
                input=stdin,
                capture_output=True,
                timeout=timeout,
                env={**self.environment, **(environment or {})},
            )
        except subprocess.TimeoutExpired as late:
            raise TimeoutError(f"{action}: not done after {timeout} s:\n{_readable(late.stderr or b'')}") from None
        result = Result(done.returncode, done.stdout, _readable(done.stderr))
        if check and result.returncode != 0:
            raise AssertionError(f"{action}: exit status {result.returncode}:\n{result.stderr}")
        return result

    @contextmanager
    def running(self, *command: str | Path) -> Iterator[subprocess.Popen[bytes]]:
        """Run a command on this machine until the end of the `with`, which kills it and its children."""
        with subprocess.Popen(self.command(*command), env=self.environment) as process:
            try:
                yield process
            finally:
                process.kill()

    @contextmanager
    def daemon(self) -> Iterator[None]:
        """Run the Nix daemon of this client, and use it for all commands."""
        socket_path = self.directory / "nix/var/nix/daemon-socket/socket"
        socket_path.unlink(missing_ok=True)
        with self.running("nix-daemon") as process:
            deadline = time.monotonic() + 60
            while not _answers(socket_path):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            self.settings["store"] = "daemon"
            try:
                yield
            finally:
                del self.settings["store"]

    def build(self, expression: str, *, timeout: float = 120) -> list[str]:
        """Build a Nix expression, without a sandbox; return the store paths of the outputs."""
        return self.run("nix-build", "--no-out-link", "-", stdin=expression.encode(), timeout=timeout).lines

    def generate_key(self, name: str) -> Key:
        """Create a signing key in this client's directory, where other clients with the same `shared` can read it."""
        secret, public = self.directory / f"{name}.secret", self.directory / f"{name}.public"
        self.run("nix-store", "--generate-binary-cache-key", name, secret, public)
        return Key(secret, public.read_text())

    def real_path(self, store_path: str) -> Path:
        """Return the path of a store path of this client outside of its machine."""
        return self._inside(Path(store_path))

    def _inside(self, path: Path) -> Path:
        return self.directory / path.relative_to("/")


def _answers(path: Path) -> bool:
    """Return True if a daemon answers at a socket. Then the tables of its store exist.

    Two processes that use a new store first, both create its tables, and one fails: "UNIQUE constraint failed:
    SchemaMigrations.migration". So no client may be there beside the first.
    """
    try:
        # A path that is short enough for a socket's address.
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    except FileNotFoundError:
        return False
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(60)
            probe.connect(f"/proc/self/fd/{directory}/{path.name}")
            probe.sendall(_HELLO)
            return bool(probe.recv(1))  # a process of the daemon opens the store before it answers
    except OSError:
        return False
    finally:
        os.close(directory)


def _readable(output: bytes) -> str:
    return output.decode(errors="backslashreplace")

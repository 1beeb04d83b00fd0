"""Small disks, which tests fill: file systems in memory. Only root may mount them."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.running import patched

_CLONE_NEWNS = 0x20000


@contextmanager
def mounted(directory: Path, size: str = "2m") -> Iterator[Path]:
    """Create the directory, and mount an empty disk there. `size` has a unit of tmpfs(5)."""
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


def with_small_disk(directory: Path, size: str = "4m") -> list[str]:
    """Return the command of the server with an empty disk on a directory, which only the server sees."""
    directory.mkdir(exist_ok=True)
    return with_mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory))


def with_mount(*arguments: str) -> list[str]:
    """Return the command of a server that first mounts something, which only it sees."""
    return patched(
        "import ctypes, os, subprocess\n"
        f"if ctypes.CDLL(None, use_errno=True).unshare({_CLONE_NEWNS}):\n"
        "  raise OSError(ctypes.get_errno(), 'unshare')\n"
        "subprocess.run(['mount', '--make-rprivate', '/'], check=True)\n"
        f"subprocess.run({['mount', *arguments]!r}, check=True)"
    )

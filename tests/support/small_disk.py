"""Small disks, which tests fill: file systems in memory. Only root may mount them."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.running import HARMONIA


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
    mount = f"mount -t tmpfs -o size={size} tmpfs '{directory}' && exec \"$@\""
    return ["unshare", "--mount", "sh", "-c", mount, "sh", *HARMONIA]

"""External programs of tests: a test is skipped without its program, and the reason names the remedy."""

import os
import re
import shutil
import subprocess
from collections import Counter
from functools import cache

import pytest

_PACKAGES = {
    "ip": "iproute2",
    "mksquashfs": "squashfs-tools",
    "nginx": "nginx-light",
    "nix": "nix-bin",
    "nix-instantiate": "nix-bin",
    "nix-store": "nix-bin",
    "objcopy": "binutils",
    "promtool": "prometheus",
    "systemd-analyze": "systemd",
    "unshare": "util-linux",
}
"""Debian packages whose names differ from those of their programs."""


def missing(*programs: str) -> str | None:
    """Return a reason to skip a test that needs these programs, or None if all are there."""
    for program in programs:
        if shutil.which(program) is None:
            return f"no {program} on this machine: apt-get install {_PACKAGES.get(program, program)}"
    return None


def needs(*programs: str) -> pytest.MarkDecorator:
    """Skip the test if a program is missing."""
    reason = missing(*programs)
    return pytest.mark.skipif(reason is not None, reason=str(reason))


def require(*programs: str) -> None:
    """Skip the running test if a program is missing."""
    if reason := missing(*programs):
        pytest.skip(reason)


NOT_ROOT = "not root: run make test as root"
PRIVILEGED = "run make test in a container with CAP_SYS_ADMIN"
NAMESPACES = ("unshare", "--mount", "--pid", "--fork", "--kill-child")
"""Prefix of a command that gets mounts and processes of its own."""


@cache
def namespaces_forbidden() -> str | None:
    """Return a reason to skip tests that mount, or None if root may do that here: in containers it often may not."""
    if reason := missing("unshare"):
        return reason
    tried = subprocess.run([*NAMESPACES, "true"], check=False, capture_output=True, text=True, timeout=30)
    if tried.returncode == 0:
        return None
    return f"no private namespaces here ({tried.stderr.strip().replace(': ', ', ')}): {PRIVILEGED}"


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason=NOT_ROOT)


def skips(reasons: Counter[str]) -> str:
    """Return one line that counts the skipped tests by cause, and names remedies."""
    causes: Counter[str] = Counter()
    packages, remedies = set(), set()
    for reason, count in reasons.items():
        cause, _, remedy = reason.partition(": ")
        causes[cause] += count
        if found := re.fullmatch("apt-get install (.+)", remedy):
            packages.add(found[1])
        elif remedy:
            remedies.add(remedy)
    listed = ", ".join(f"{count} {cause}" for cause, count in causes.most_common())
    if packages:
        remedies.add(f"apt-get install {' '.join(sorted(packages))}")
    number = causes.total()
    line = f"{number} {'test' if number == 1 else 'tests'} skipped: {listed}"
    return f"{line}; to run them: {'; '.join(sorted(remedies))}" if remedies else line

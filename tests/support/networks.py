"""Network namespaces of `ip netns`: a thread enters one, or a program starts in one."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import pytest

from support.programs import PRIVILEGED


@contextmanager
def network(name: str) -> Iterator[None]:
    """Run the body of the `with` statement in that network namespace. A socket stays in the one that it is made in."""
    with open("/proc/thread-self/ns/net", "rb") as ours, open(f"/run/netns/{name}", "rb") as other:
        _enter(other)
        try:
            yield
        finally:
            _enter(ours)


def _enter(namespace: BinaryIO) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0) != 0:
        pytest.skip(f"no network namespaces here ({os.strerror(ctypes.get_errno())}): {PRIVILEGED}")


def entering(name: str) -> str:
    """Return statements for `patched` by which the program enters that network namespace when it starts."""
    return (
        "import ctypes, os\n"
        f"with open('/run/netns/{name}') as namespace:\n"
        "  if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0):\n"
        "    raise OSError(ctypes.get_errno(), 'setns')\n"
    )

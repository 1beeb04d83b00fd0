"""Sandbox probe: tries actions that the service must not be able to do, and prints the result of each."""

import ctypes
import os
import socket
import sys
from collections.abc import Callable

CLONE_NEWUSER = 0x10000000


def write(path: str) -> None:
    with open(path, "xb"):
        pass
    os.unlink(path)


def connect(host: str) -> None:
    socket.create_connection((host, 22222), timeout=5).close()


def ask_daemon() -> None:
    with socket.socket(socket.AF_UNIX) as daemon:
        daemon.connect("/nix/var/nix/daemon-socket/socket")


def make_namespace() -> None:
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUSER) != 0:
        raise OSError(ctypes.get_errno(), "unshare")


def attempts(peer: str) -> dict[str, Callable[[], None]]:
    return {
        "write the store": lambda: write("/nix/store/probe"),
        "write the database": lambda: write("/nix/var/nix/db/probe"),
        "write /etc": lambda: write("/etc/probe"),
        "write /var": lambda: write("/var/lib/probe"),
        "read the secret key": lambda: open("/etc/cache.secret").close(),
        "see home directories": lambda: os.stat("/root/probe") and None,
        "see other processes": lambda: os.stat("/proc/1") and None,
        "connect to a machine": lambda: connect(peer),
        "ask the Nix daemon": ask_daemon,
        "make a user namespace": make_namespace,
    }


if __name__ == "__main__":
    for name, attempt in attempts(sys.argv[1]).items():
        try:
            attempt()
        except OSError as error:
            print(f"not: {name}: {error.strerror or error}")
        else:
            print(f"could: {name}")

"""systemd's interface for services: sd_listen_fds(3), sd_notify(3) and sd_watchdog_enabled(3)."""

import os
import socket
from collections.abc import Mapping, MutableMapping
from contextlib import suppress

from harmonia.errors import ConfigError
from harmonia.untrusted import integer

_FIRST_FD = 3  # SD_LISTEN_FDS_START
_MAX_SOCKETS = 1 << 16
_MAX_INTERVAL_US = 1 << 63


def has_sockets(environ: Mapping[str, str]) -> bool:
    """Return True if systemd has passed sockets to this process."""
    return environ.get("LISTEN_PID") == str(os.getpid()) and environ.get("LISTEN_FDS", "0") != "0"


def inherited_sockets(environ: MutableMapping[str, str]) -> list[socket.socket]:
    """Return the listening sockets that systemd has passed to this process. Remove their variables from `environ`.

    Raises ConfigError if systemd has passed a descriptor that does not listen.
    """
    pid, count, _ = (environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()):
        return []
    sockets = []
    for fd in range(_FIRST_FD, _FIRST_FD + (integer(count, _MAX_SOCKETS) or 0)):
        try:
            os.set_inheritable(fd, False)
            inherited = socket.socket(fileno=fd)
            listening = inherited.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError:
            listening = 0
        if not listening:
            raise ConfigError(
                f"systemd passed descriptor {fd}, which does not listen; use ListenStream= in the socket unit"
            )
        sockets.append(inherited)
    return sockets


def notify(state: str) -> None:
    """Send a state such as `READY=1` to the service manager, if there is one. Ignore errors."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        # A leading @ stands for the leading zero byte of an abstract socket.
        channel.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


def watchdog_interval() -> float | None:
    """Return the watchdog timeout of this process in seconds, or None without a watchdog."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    interval = integer(os.environ.get("WATCHDOG_USEC", ""), _MAX_INTERVAL_US)
    return interval / 1e6 if interval else None

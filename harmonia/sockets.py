"""The sockets we listen on where systemd passes none."""

import errno
import logging
import os
import resource
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from harmonia.errors import ConfigError
from harmonia.settings import Settings

BACKLOG = 4096
"""Connections that wait to be accepted, if the kernel allows as many (net.core.somaxconn)."""

_OPTIONS = (
    # An idle client that is gone is known by what it no longer acknowledges. One that does acknowledge may stop reading
    # for minutes: tcp(7) TCP_USER_TIMEOUT would end that too.
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
)

_DESCRIPTORS = 2  # of a connection: its own, and that of the file that is sent
_OTHER_DESCRIPTORS = 512  # of a worker: databases, NARs that are being compressed, upstreams, the daemon

_log = logging.getLogger("harmonia")


@contextmanager
def listen(settings: Settings, key: Literal["bind", "metrics_bind"]) -> Iterator[list[socket.socket]]:
    """Listening sockets for that setting, none where it is not set. ConfigError where that cannot be."""
    address = settings.address(key)
    try:
        if address is None:
            sockets = []
        else:
            sockets = [_listen_unix(address, settings)] if isinstance(address, str) else _listen_tcp(key, *address)
    except OSError as error:
        what = "is already in use" if error.errno == errno.EADDRINUSE else f"cannot be listened on: {error.strerror}"
        raise ConfigError(
            f"{key}: {getattr(settings, key)} {what}; choose another address, or stop what listens there"
        ) from error
    try:
        yield sockets
    finally:
        for each in sockets:
            each.close()
        if isinstance(address, str):
            with suppress(FileNotFoundError):
                os.unlink(address)


def notice_lost_clients(listening: socket.socket) -> None:
    """Let the connections of a listening socket, ours or systemd's, end when nobody is there any more."""
    if listening.family != socket.AF_UNIX:  # there the kernel always knows
        for level, option, value in _OPTIONS:
            listening.setsockopt(level, option, value)


def admitted(most: int) -> int:
    """How many connections a worker may have at once: `most`, where 0 is any number, or what descriptors there are for.

    Raises the limit of open files as far as this process may.
    """
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # a sandbox may forbid it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        limit = hard
    possible = max((limit - _OTHER_DESCRIPTORS) // _DESCRIPTORS, 16)
    return min(most or possible, possible)


def url(listening: socket.socket, *, tls: bool) -> str:
    """How a client on this machine reaches a listening socket."""
    if listening.family == socket.AF_UNIX:
        return f"unix:{listening.getsockname()}"
    host, port = listening.getsockname()[:2]
    host = {"::": "localhost", "0.0.0.0": "localhost"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104 (it is compared)
    return f"{'https' if tls else 'http'}://{host}:{port}"


def _listen_tcp(key: str, host: str, port: int) -> list[socket.socket]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ConfigError(f"{key}: no address is known for host {host!r}: {error.strerror}") from error
    if host == "::" and not _has_ipv6():
        _log.warning("%s: this machine has no IPv6; listening on 0.0.0.0 instead of [::]", key)
        return _listen_tcp(key, "0.0.0.0", port)  # noqa: S104 (what the setting asks for)
    sockets = []
    try:
        for family, *_, address in dict.fromkeys(found):  # a name may have an address twice
            each = socket.socket(family, socket.SOCK_STREAM)
            sockets.append(each)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                each.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(host != "::"))
            each.bind(address)
            each.listen(BACKLOG)
    except BaseException:
        for each in sockets:
            each.close()
        raise
    return sockets


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::", 0))
    except OSError:
        return False
    return True


def _listen_unix(path: str, settings: Settings) -> socket.socket:
    _remove_stale(path)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(path)
        os.chmod(path, int(settings.unix_socket_mode, 8))
        listening.listen(BACKLOG)
    except BaseException:
        listening.close()
        raise
    return listening


def _remove_stale(path: str) -> None:
    """Remove a socket that nobody listens on any more, as an unclean end leaves behind. Anything else stays."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)

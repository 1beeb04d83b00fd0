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

from harmonia.config.settings import Settings, WrongSettingError
from harmonia.untrusted import integer

BACKLOG = 4096
"""Connections that wait to be accepted, if the kernel allows as many (net.core.somaxconn)."""

_OPTIONS = (
    # An idle client that is gone is known by what it no longer acknowledges. One that does acknowledge may stop reading
    # for minutes: tcp(7) TCP_USER_TIMEOUT would end that too.
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
)

_DESCRIPTORS_PER_CONNECTION = 2  # of a connection: its own, and that of the file that is sent
_OTHER_DESCRIPTORS = 512  # of a worker: databases, NARs that are being compressed, upstreams, the daemon

_MAX_MODE = 0o7777
_Key = Literal["bind", "metrics_bind"]

_log = logging.getLogger("harmonia")


@contextmanager
def listen(settings: Settings, key: _Key) -> Iterator[list[socket.socket]]:
    """Listening sockets for that setting, none where it is not set. WrongSettingError where that cannot be."""
    address = settings.address(key)
    sockets: list[socket.socket] = []
    try:
        if isinstance(address, str):
            sockets = [_listen_unix(address, settings)]
        elif address is not None:
            sockets = _bound(*address)
            for each in sockets:
                each.listen(BACKLOG)
            if address[0] == "::" and sockets[0].family == socket.AF_INET:
                _log.warning("%s: this machine has no IPv6; listening on 0.0.0.0 instead of [::]", key)
    except OSError as error:
        for each in sockets:
            each.close()
        raise _wrong(settings, key, error) from error
    try:
        yield sockets
    finally:
        for each in sockets:
            each.close()
        if isinstance(address, str):
            with suppress(FileNotFoundError):
                os.unlink(address)


def check(settings: Settings, key: _Key) -> None:
    """Whether that address could be listened on, if nobody did: who does may be this very server, which is left alone.

    WrongSettingError where it could not.
    """
    address = settings.address(key)
    try:
        if isinstance(address, str):
            _check_unix(address)
        elif address is not None:
            for each in _bound(*address):
                each.close()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise _wrong(settings, key, error) from error


def enable_keepalive(listening: socket.socket) -> None:
    """Enable TCP keepalive for connections of a listening socket, so that those of lost clients end."""
    if listening.family != socket.AF_UNIX:  # there the kernel always knows
        for level, option, value in _OPTIONS:
            listening.setsockopt(level, option, value)


def connection_limit(most: int) -> int:
    """How many connections a worker may have at once: `most`, where 0 is any number, or what descriptors there are for.

    Raises the limit of open files as far as this process may.
    """
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # a sandbox may forbid it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        limit = hard
    possible = max((limit - _OTHER_DESCRIPTORS) // _DESCRIPTORS_PER_CONNECTION, 16)
    return min(most or possible, possible)


def url(listening: socket.socket, *, tls: bool) -> str:
    """How a client on this machine reaches a listening socket."""
    if listening.family == socket.AF_UNIX:
        return f"unix:{listening.getsockname()}"
    host, port = listening.getsockname()[:2]
    host = {"::": "localhost", "0.0.0.0": "localhost"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104 (it is compared)
    return f"{'https' if tls else 'http'}://{host}:{port}"


def _wrong(settings: Settings, key: _Key, error: OSError) -> WrongSettingError:
    address = settings.address(key)
    remedy = "choose another address"
    if isinstance(error, socket.gaierror):
        what = f"names a host that has no address: {error.strerror}"
    elif error.errno == errno.EADDRINUSE:
        option = ", as by harmonia serve --bind :8080" if key == "bind" else ""
        what, remedy = "is already in use", f"choose another address{option}, or stop what listens there"
    elif isinstance(address, str) and error.errno == errno.ENOENT:
        what, remedy = "has no directory", f"make {os.path.dirname(address)!r}, in systemd with RuntimeDirectory="
    elif isinstance(address, str) and error.errno == errno.EEXIST:
        what, remedy = "is there, and is no socket", "choose another path, or remove what is there"
    else:
        what = f"cannot be listened on: {error.strerror}"
    return WrongSettingError(f"{getattr(settings, key)} {what}; {remedy}", key)


def _bound(host: str, port: int) -> list[socket.socket]:
    """Sockets at all addresses of that host, which do not listen yet."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except UnicodeError:  # it is no name at all: a label is empty, or too long
        raise socket.gaierror(socket.EAI_NONAME, "it is no host name") from None
    if host == "::" and not _has_ipv6():
        return _bound("0.0.0.0", port)  # noqa: S104 (what the setting asks for)
    sockets = []
    try:
        for family, *_, address in dict.fromkeys(found):  # a name may have an address twice
            each = socket.socket(family, socket.SOCK_STREAM)
            sockets.append(each)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                each.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(host != "::"))
            each.bind(address)
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


def _check_unix(path: str) -> None:
    """That there is a directory for it, and nothing in the way but a socket."""
    directory = os.path.dirname(path) or "."
    os.stat(os.path.join(directory, ""))
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    except FileNotFoundError:
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None


def _listen_unix(path: str, settings: Settings) -> socket.socket:
    _check_unix(path)
    _remove_stale(path)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(path)
        os.chmod(path, integer(settings.unix_socket_mode, _MAX_MODE, base=8) or 0)
        listening.listen(BACKLOG)
    except BaseException:
        listening.close()
        raise
    return listening


def _remove_stale(path: str) -> None:
    """Remove a socket that nobody listens on any more, as an unclean end leaves behind."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except FileNotFoundError:
            pass

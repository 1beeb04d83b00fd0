"""Listening sockets, if systemd does not pass any."""

import errno
import logging
import os
import resource
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from harmonia.config.settings import Settings
from harmonia.config.value_types import HostAndPort
from harmonia.config.wrong_setting import WrongSettingError
from harmonia.untrusted import integer

BACKLOG = 4096
"""Maximum number of connections that wait to be accepted. The kernel may lower it (net.core.somaxconn)."""

_OPTIONS = (
    # Keepalive probes detect an idle client that has disappeared. TCP_USER_TIMEOUT (tcp(7)) would also disconnect live
    # clients that stop reading for minutes.
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
)

_DESCRIPTORS_PER_CONNECTION = 2  # the socket, and the file that is sent
_OTHER_DESCRIPTORS = 512  # of a worker, for databases, NARs in compression, upstreams and the Nix daemon

_MAX_MODE = 0o7777
_Key = Literal["bind", "metrics_bind"]

_log = logging.getLogger("harmonia")


@contextmanager
def listen(settings: Settings, key: _Key) -> Iterator[list[socket.socket]]:
    """Open the listening sockets for a setting, none if it is not set, and close them at the end.

    Raises WrongSettingError if the address cannot be used.
    """
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
                _log.warning("%s: cannot listen on [::]: this machine has no IPv6; using 0.0.0.0 instead", key)
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
    """Check the address of a setting.

    Raises WrongSettingError if the address cannot be used. An address that is in use passes, because this server itself
    may be running.
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
    """Enable TCP keepalive for connections of a listening socket, to end those of clients that have disappeared."""
    if listening.family != socket.AF_UNIX:  # the kernel ends these connections when a client ends
        for level, option, value in _OPTIONS:
            listening.setsockopt(level, option, value)


def connection_limit(most: int) -> int:
    """Return the maximum of open connections of a worker: `most`, or fewer if there are not enough descriptors.

    If `most` is 0, the descriptors alone set the limit; the result is never 0.
    Sets the soft limit of open files to the hard limit, if that is allowed.
    """
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # a sandbox may forbid it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        limit = hard
    possible = max((limit - _OTHER_DESCRIPTORS) // _DESCRIPTORS_PER_CONNECTION, 16)
    return min(most or possible, possible)


def url(address: HostAndPort | str, *, tls: bool) -> str:
    """Return the URL by which a client on this machine reaches an address to listen on."""
    if isinstance(address, str):
        return f"unix:{address}"
    host, port = address[:2]  # followed by flow and scope if it is the name of an IPv6 socket
    host = {"::": "localhost", "0.0.0.0": "localhost"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104 (a comparison, not a bind)
    return f"{'https' if tls else 'http'}://{host}:{port}"


def _wrong(settings: Settings, key: _Key, error: OSError) -> WrongSettingError:
    address = settings.address(key)
    remedy = "choose another address"
    if isinstance(error, socket.gaierror):
        what = f"cannot be resolved: {error.strerror}"
    elif error.errno == errno.EADDRINUSE:
        option = ", as by harmonia serve --bind :8080" if key == "bind" else ""
        what, remedy = "is already in use", f"choose another address{option}, or stop the program that uses it"
    elif isinstance(address, str) and error.errno == errno.ENOENT:
        directory = os.path.dirname(address)
        what, remedy = "is in a missing directory", f"create {directory!r}, in systemd with RuntimeDirectory="
    elif isinstance(address, str) and error.errno == errno.EEXIST:
        what, remedy = "exists and is not a socket", "choose another path, or remove the file"
    else:
        what = f"cannot be used: {error.strerror}"
    return WrongSettingError(f"{getattr(settings, key)} {what}; {remedy}", key)


def _bound(host: str, port: int) -> list[socket.socket]:
    """Return sockets that are bound to all addresses of the host, but do not listen yet."""
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except UnicodeError:  # a label of the name is empty or too long
        raise socket.gaierror(socket.EAI_NONAME, "not a host name") from None
    if host == "::" and not _has_ipv6():
        return _bound("0.0.0.0", port)  # noqa: S104 (the setting is all addresses)
    sockets = []
    try:
        for family, *_, address in dict.fromkeys(infos):  # a name may have the same address twice
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
    """Raise OSError unless `path` is a socket, or can be created."""
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
    """Remove a socket without a listening process, as an unclean end of a server leaves it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except FileNotFoundError:
            pass

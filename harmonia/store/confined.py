"""Opening by a path that no symlink is part of, whatever others change meanwhile.

What is walked or listed by one name after the other may be another thing the next time it is named: a directory that
became a symlink would lead the reader out of the store object, to whatever its user may read. The kernel sees to it
that none is followed (openat2(2), since Linux 5.6). Where it does not know how, each name is opened in the one before.
"""

import ctypes
import errno
import os
import struct
from collections.abc import Sequence
from contextlib import suppress

from harmonia.errors import StoreObjectError

_OPENAT2 = 437  # the number of the system call, the same on all architectures that Nix knows
_RESOLVE_NO_SYMLINKS = 0x04
_AT_FDCWD = -100
_UNKNOWN = (errno.ENOSYS, errno.EPERM)  # the latter from older sandboxes, of which it may be true as well

_how = struct.Struct("=QQQ")  # struct open_how: flags, mode, resolve
_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t)
_syscall.restype = ctypes.c_long


class SymlinkError(StoreObjectError, OSError):
    """The name at `depth` is a symlink, which leads to `target`."""

    def __init__(self, name: bytes, depth: int, target: bytes) -> None:
        super().__init__(errno.ELOOP, os.strerror(errno.ELOOP), name)
        self.depth = depth
        self.target = target


def resolved(path: bytes) -> bytes:
    """The same place without symlinks on the way there; itself, it may be one."""
    directory, name = os.path.split(path)
    return os.path.join(os.path.realpath(directory or b"."), name)


def open_file(path: bytes, flags: int) -> int:
    """A descriptor of what is at `path`. OSError, with ELOOP where there is a symlink, at its end or before."""
    how = _how.pack(flags | os.O_CLOEXEC, 0, _RESOLVE_NO_SYMLINKS)
    while (descriptor := _syscall(_OPENAT2, _AT_FDCWD, path, how, _how.size)) < 0:
        error = ctypes.get_errno()
        if error in _UNKNOWN:
            root = b"/" if path.startswith(b"/") else b"."
            try:
                return open_in_turn([root, *filter(None, path.split(b"/"))], flags)
            except OSError as unopened:
                unopened.filename = path
                raise
        if error != errno.EINTR:
            raise OSError(error, os.strerror(error), path)
    return int(descriptor)


class Files:
    """Opens files by their paths. Those of one directory, which come one after the other, are opened in it."""

    def __init__(self) -> None:
        self._directory: bytes | None = None
        self._descriptor = -1

    def open(self, path: bytes, flags: int) -> int:
        """As `open_file`."""
        directory, _, name = path.rpartition(b"/")
        if directory != self._directory:
            self.close()
            self._descriptor = open_file(directory or b"/", os.O_PATH | os.O_DIRECTORY)
            self._directory = directory
        try:
            return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._descriptor)
        except OSError as error:
            error.filename = path
            raise

    def close(self) -> None:
        """Nothing stays open. It may be used again."""
        if self._directory is not None:
            self._directory = None
            os.close(self._descriptor)


def open_in_turn(names: Sequence[bytes], flags: int) -> int:
    """Open each name in the directory that the one before names. Return the descriptor of the last.

    Raises SymlinkError if one of them is a symlink, and OSError if one cannot be opened.
    """
    descriptor = None
    for depth, name in enumerate(names):
        how = flags if depth == len(names) - 1 else os.O_PATH | os.O_DIRECTORY
        directory = descriptor
        try:
            descriptor = os.open(name, how | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=directory)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):  # the latter for a symlink in place of a directory
                with suppress(OSError):
                    target = os.readlink(name, dir_fd=directory)
                    error = SymlinkError(name, depth, target)
            raise error from None
        finally:
            if directory is not None:
                os.close(directory)
    assert descriptor is not None  # noqa: S101 (there is at least one name)
    return descriptor

"""Race-free opening of files without following symlinks in any component of the path.

Another process can replace a directory by a symlink between two calls. A reader that follows it would leave the store
object, and send any file that the server's user may read. openat2(2), since Linux 5.6, makes the kernel refuse all
symlinks. On older kernels, each component is opened in the directory before it.
"""

import ctypes
import errno
import os
import struct
from collections.abc import Sequence
from contextlib import suppress

from harmonia.errors import StoreObjectError

_OPENAT2 = 437  # number of the system call, the same on all architectures that Nix supports
_RESOLVE_NO_SYMLINKS = 0x04
_AT_FDCWD = -100
_UNKNOWN = (errno.ENOSYS, errno.EPERM)  # older sandboxes return EPERM, but EPERM may also be a real error

_how = struct.Struct("=QQQ")  # struct open_how: flags, mode, resolve
_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t)
_syscall.restype = ctypes.c_long


class SymlinkError(StoreObjectError, OSError):
    """The name at index `depth` is a symlink to `target`."""

    def __init__(self, name: bytes, depth: int, target: bytes) -> None:
        super().__init__(errno.ELOOP, os.strerror(errno.ELOOP), name)
        self.depth = depth
        self.target = target


def resolved(path: bytes) -> bytes:
    """Return the path with all symlinks resolved except in its last component, which may be a symlink."""
    directory, name = os.path.split(path)
    return os.path.join(os.path.realpath(directory or b"."), name)


def open_file(path: bytes, flags: int) -> int:
    """Open the file or directory at `path`, and return its descriptor.

    Raises OSError if that fails, with ELOOP if any component of `path` is a symlink.
    """
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
    """An opener that keeps the last directory open, so that the next file in the same directory opens faster."""

    def __init__(self) -> None:
        self._directory: bytes | None = None
        self._descriptor = -1

    def open(self, path: bytes, flags: int) -> int:
        """Open the file at `path` like `open_file`."""
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
        """Close the directory. The opener may be used again."""
        if self._directory is not None:
            self._directory = None
            os.close(self._descriptor)


def open_in_turn(names: Sequence[bytes], flags: int) -> int:
    """Open each name in the directory of the name before. Return the descriptor of the last.

    Raises SymlinkError if a name is a symlink, and OSError if a name cannot be opened.
    """
    descriptor = None
    for depth, name in enumerate(names):
        how = flags if depth == len(names) - 1 else os.O_PATH | os.O_DIRECTORY
        directory = descriptor
        try:
            descriptor = os.open(name, how | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=directory)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):  # ENOTDIR if a symlink has replaced a directory
                with suppress(OSError):
                    target = os.readlink(name, dir_fd=directory)
                    error = SymlinkError(name, depth, target)
            raise error from None
        finally:
            if directory is not None:
                os.close(directory)
    assert descriptor is not None  # noqa: S101 (there is at least one name)
    return descriptor

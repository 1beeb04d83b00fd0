"""Temporary directories of commands, which the next command removes if a command was killed.

A directory belongs to the process that has locked it. The kernel releases the lock if that process dies.
"""

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

_PREFIX = "harmonia-nars-"


@contextmanager
def directory() -> Iterator[str]:
    """Yield a new directory in $TMPDIR, and remove it at the end. Raises OSError if it cannot be created."""
    _remove_abandoned()
    with ExitStack() as stack:
        while True:
            path = tempfile.mkdtemp(prefix=_PREFIX)
            stack.callback(shutil.rmtree, path, ignore_errors=True)
            descriptor = _locked(path, fcntl.LOCK_EX)
            if descriptor is not None:
                stack.callback(os.close, descriptor)
            if os.path.exists(path):  # also on a file system without locks, where no command removes directories
                break
        yield path


def _remove_abandoned() -> None:
    """Remove the directories that no process has locked."""
    for path in glob.glob(f"{glob.escape(tempfile.gettempdir())}/{_PREFIX}*"):
        if (descriptor := _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)) is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(descriptor)


def _locked(path: str, operation: int) -> int | None:
    """Open and lock a directory of this user. Return None if another process has locked or removed it."""
    with ExitStack() as stack, suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        stack.callback(os.close, descriptor)
        if os.fstat(descriptor).st_uid == os.geteuid():
            fcntl.flock(descriptor, operation)
            if os.path.exists(path):
                stack.pop_all()
                return descriptor
    return None

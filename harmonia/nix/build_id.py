"""Build IDs, by which debuggers find the debug info that was separated from a binary.

A store path has the debug info in `lib/debug/.build-id/xx/yyyy.debug`; `xxyyyy` is the build ID that the linker wrote
into the binary. As in Nix's option `index-debug-info` (`src/libstore/binary-cache-store.cc`), only regular files count,
and only below real directories: a file that is reached through a symlink is not in the NAR.
"""

import os
import re
import stat
from collections.abc import Iterator

_BUILD_ID = re.compile(r"[0-9a-f]{4,128}")
"""Hexadecimal digits: 20 bytes from GNU ld's SHA-1, 16 from its MD5 or a UUID, 8 from lld.

A build ID that is given to the linker by hand has any length.
"""

_DIRECTORY = "lib/debug/.build-id"
_SUFFIX = ".debug"


def is_build_id(text: str) -> bool:
    """Return True if `text` has the form of a build ID, in lower case."""
    return _BUILD_ID.fullmatch(text) is not None


def member(build_id: str) -> str:
    """Return the path of the debug file with this build ID, relative to its store path."""
    return f"{_DIRECTORY}/{build_id[:2]}/{build_id[2:]}{_SUFFIX}"


def build_ids(root: bytes) -> Iterator[str]:
    """Yield the build IDs of the debug files in the store object at `root`.

    A store object without debug files, as most are, costs one failing lstat.
    """
    directory = f"{os.fsdecode(root)}/{_DIRECTORY}"
    try:
        status = os.lstat(directory)
    except (FileNotFoundError, NotADirectoryError):
        return
    above = (root, root + b"/lib", root + b"/lib/debug")
    if not all(stat.S_ISDIR(each.st_mode) for each in (status, *map(os.lstat, above))):
        return
    for first in list(os.scandir(directory)):
        if re.fullmatch("[0-9a-f]{2}", first.name) and first.is_dir(follow_symlinks=False):
            for file in list(os.scandir(first.path)):
                build_id = first.name + file.name.removesuffix(_SUFFIX)
                if file.name.endswith(_SUFFIX) and is_build_id(build_id) and file.is_file(follow_symlinks=False):
                    yield build_id

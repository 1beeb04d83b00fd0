"""Build ids, by which debuggers find the debug info that was separated from a binary.

It lies in `lib/debug/.build-id/xx/yyyy.debug` of a store path, where `xxyyyy` is the build id that the linker noted in
the binary. What counts is what Nix counts that indexes it in a binary cache (`index-debug-info`,
`src/libstore/binary-cache-store.cc`): regular files, in directories that are no symlinks, so that they are in the NAR.
"""

import os
import re
import stat
from collections.abc import Iterator

_BUILD_ID = re.compile(r"[0-9a-f]{4,128}")
"""20 bytes with GNU ld's SHA-1, 16 with its MD5 or a UUID, 8 with lld; any number can be given to the linker."""

_DIRECTORY = "lib/debug/.build-id"
_SUFFIX = ".debug"


def is_build_id(text: str) -> bool:
    return _BUILD_ID.fullmatch(text) is not None


def member(build_id: str) -> str:
    """Where a debug file with that build id lies in its store path."""
    return f"{_DIRECTORY}/{build_id[:2]}/{build_id[2:]}{_SUFFIX}"


def build_ids(root: bytes) -> Iterator[str]:
    """The build ids of the debug files in the store object at `root`. For all but a few, that is one failing stat."""
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

"""Store paths: `<hash part>-<name>` in a store directory (Nix `src/libstore/path.cc`)."""

import re
from typing import Self

from harmonia.errors import FormatError
from harmonia.nix import base32
from harmonia.untrusted import excerpt

HASH_PART_LENGTH = 32
_HASH_PART = re.compile(f"[{base32.ALPHABET}]{{32}}")
# A name may start with a dot since Nix 2.21, but may be neither `.` nor `..`, nor start with one of them and a dash.
_BASE_NAME = re.compile(rf"{_HASH_PART.pattern}-(?!\.\.?(?:-|$))[0-9A-Za-z+\-._?=]{{1,211}}")


def is_hash_part(text: str) -> bool:
    return _HASH_PART.fullmatch(text) is not None


class StoreDirError(FormatError):
    """A path in another store directory."""


class StorePath(str):
    """A store path by its base name, without the store directory: it compares and sorts as Nix sorts references."""

    __slots__ = ()

    def __new__(cls, base_name: str) -> Self:
        """FormatError where `base_name` does not follow the grammar."""
        if not _BASE_NAME.fullmatch(base_name):
            raise FormatError(f"{excerpt(base_name)} is not the base name of a store path")
        return super().__new__(cls, base_name)

    @classmethod
    def in_dir(cls, store_dir: str, path: str) -> Self:
        """Return the store path that the full `path` names.

        Raise StoreDirError if it lies elsewhere, FormatError if it is malformed or lies deeper.
        """
        if not path.startswith(store_dir + "/"):
            raise StoreDirError(f"{excerpt(path)} is not in the store {store_dir}")
        return cls(path[len(store_dir) + 1 :])

    @property
    def hash_part(self) -> str:
        return self[:HASH_PART_LENGTH]

    @property
    def name(self) -> str:
        return self[HASH_PART_LENGTH + 1 :]

    @property
    def is_derivation(self) -> bool:
        return self.endswith(".drv")

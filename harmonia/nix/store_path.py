"""Store paths: `<hash part>-<name>` in a store directory (Nix `src/libstore/path.cc`)."""

import re
from functools import lru_cache
from typing import Self

from harmonia.errors import FormatError
from harmonia.nix import base32
from harmonia.untrusted import excerpt

HASH_PART_LENGTH = 32
_HASH_PART = re.compile(f"[{base32.ALPHABET}]{{32}}")
# Since Nix 2.21 a name may start with a dot. It must not be `.` or `..`, or start with `.-` or `..-`.
_BASE_NAME = re.compile(rf"{_HASH_PART.pattern}-(?!\.\.?(?:-|$))[0-9A-Za-z+\-._?=]{{1,211}}")


@lru_cache(8)
def _full_path(store_dir: str) -> "re.Pattern[str]":
    return re.compile(f"{re.escape(store_dir)}/({_BASE_NAME.pattern})")


def is_hash_part(text: str) -> bool:
    """Return True if `text` has the form of a hash part: 32 digits of Nix's base-32."""
    return _HASH_PART.fullmatch(text) is not None


class StoreDirError(FormatError):
    """A path is in another directory than the store directory."""


class StorePath(str):
    """The base name of a store path, without the store directory. It sorts as Nix sorts references."""

    __slots__ = ()

    def __new__(cls, base_name: str) -> Self:
        """Return the store path with this base name.

        Raises FormatError if `base_name` does not match the grammar.
        """
        if not _BASE_NAME.fullmatch(base_name):
            raise FormatError(f"{excerpt(base_name)} is not the base name of a store path")
        return super().__new__(cls, base_name)

    @classmethod
    def in_dir(cls, store_dir: str, path: str) -> Self:
        """Return the store path of the full path `path`.

        Raises StoreDirError if `path` is not in `store_dir`.
        Raises FormatError if `path` is malformed, or names a file inside a store path.
        """
        if match := _full_path(store_dir).fullmatch(path):
            return super().__new__(cls, match[1])
        if not path.startswith(store_dir + "/"):
            raise StoreDirError(f"{excerpt(path)} is not in the store {store_dir}")
        raise FormatError(f"{excerpt(path[len(store_dir) + 1 :])} is not the base name of a store path")

    @property
    def hash_part(self) -> str:
        return self[:HASH_PART_LENGTH]

    @property
    def name(self) -> str:
        return self[HASH_PART_LENGTH + 1 :]

    @property
    def is_derivation(self) -> bool:
        return self.endswith(".drv")

"""Patterns for names of store paths, which are the paths without their directory and hash."""

import fnmatch
import re
import reprlib
from collections.abc import Iterable

from harmonia.errors import FormatError
from harmonia.nix.store_path import is_hash_part

# Characters of names, wildcards and sets. For fnmatch, a `[` without `]` does not begin a set.
_PATTERN = re.compile(r"(?:[0-9A-Za-z+\-._?=*]|\[!?\]?[^]]*\])+")


def check_pattern(text: str) -> None:
    """Raise FormatError if the pattern cannot match the name of any store path."""
    if not _PATTERN.fullmatch(text) or (is_hash_part(text[:32]) and text[32:33] == "-"):
        what = f"{reprlib.repr(text)} cannot match any name; a name is a store path without its directory and hash"
        raise FormatError(f"{what}, and consists of letters, digits and +-._?=")


def compile_patterns(patterns: Iterable[str]) -> "re.Pattern[str]":
    """Return a regular expression that matches the names that one of the patterns matches."""
    return re.compile("|".join(map(fnmatch.translate, patterns)))

"""Package names and versions in the names of store paths (Nix `src/libstore/names.cc`, `src/nix/diff-closures.cc`)."""

import re
from typing import NamedTuple

_VERSION = re.compile(r"-(?![A-Za-z])(?=.)")
_OUTPUT = re.compile(r"(?P<version>.*)-(?:[a-z]+|lib32|lib64)")


class PackageName(NamedTuple):
    """Name and version of a package: `hello` and `2.12` for `hello-2.12` and for its output `hello-2.12-man`."""

    name: str
    version: str
    """Empty if the name has no version."""

    @classmethod
    def parse(cls, text: str) -> "PackageName":
        """Split a name at the first dash that no letter follows, and drop the name of an output behind a version."""
        name, *rest = _VERSION.split(text, maxsplit=1)
        version = rest[0] if rest else ""
        if output := _OUTPUT.fullmatch(version):
            version = output["version"]
        return cls(name, version)

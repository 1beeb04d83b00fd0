"""What the NARs of upstreams are called here: by their content, and not by where they are.

`<hash part>-<NAR hash>-<file>.nar.<compression>`, where `<file>` is the FileHash, or, where none is told, the id of the
upstream that has the file. So a name stays true as long as any upstream has the path, or we have its NAR, and nobody
can have us fetch anything else by it.
"""

import re
from dataclasses import dataclass
from typing import Self

from harmonia.errors import FormatError
from harmonia.nix import base32
from harmonia.nix.decompress import COMPRESSIONS

_FILE_HASH_LENGTH = base32.encoded_length(32)
_DIGIT = f"[{base32.ALPHABET}]"
_NAME = re.compile(rf"({_DIGIT}{{32}})-({_DIGIT}{{52}})-({_DIGIT}{{16}}|{_DIGIT}{{52}})\.nar\.([a-z0-9]+)")


@dataclass(frozen=True, slots=True)
class NarName:
    hash_part: str
    nar_hash: str
    """In base 32, as is the next."""
    file: str
    compression: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raise FormatError if this is not the name of a NAR that can be checked."""
        match = _NAME.fullmatch(text)
        if match is None or match[4] not in COMPRESSIONS:
            raise FormatError("it is no name of a NAR")
        return cls(*match.groups())

    @property
    def key(self) -> str:
        """What it is kept by. Paths of the same content have one in common, and so have upstreams of the same file."""
        return f"{self.nar_hash}-{self.file}.nar.{self.compression}"

    @property
    def names_bytes(self) -> bool:
        """Return whether no other file can have this name: an upstream may compress a NAR anew."""
        return self.compression == "none" or len(self.file) == _FILE_HASH_LENGTH

    def may_be_at(self, upstream: str) -> bool:
        """Whether the upstream with that id may have the file. Without a hash, nobody else is known to have it."""
        return self.file == upstream or len(self.file) == _FILE_HASH_LENGTH

    def __str__(self) -> str:
        return f"{self.hash_part}-{self.key}"

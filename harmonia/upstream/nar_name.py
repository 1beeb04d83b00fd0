"""Names of upstream NARs in our URLs. A name depends on the content, not on the place of the file.

`<hash part>-<NAR hash>-<file>.nar.<compression>`. `<file>` is the FileHash, or the id of the upstream if the narinfo
has no FileHash. A name stays valid as long as any upstream has the path, or the NAR is in our cache. No client can make
us fetch another file by a name.
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
    """In base 32."""
    file: str
    """The FileHash in base 32, or the id of an upstream."""
    compression: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a name. Raises FormatError if it is malformed, or if its compression cannot be unpacked."""
        match = _NAME.fullmatch(text)
        if match is None or match[4] not in COMPRESSIONS:
            raise FormatError("malformed name of a NAR")
        return cls(*match.groups())

    @property
    def key(self) -> str:
        """Key in the NAR cache. Paths with the same content share it, and so do upstreams with the same file."""
        return f"{self.nar_hash}-{self.file}.nar.{self.compression}"

    @property
    def determines_bytes(self) -> bool:
        """Return True if the name determines the bytes. Without a FileHash, the upstream may compress the NAR again."""
        return self.compression == "none" or len(self.file) == _FILE_HASH_LENGTH

    def may_be_at(self, upstream: str) -> bool:
        """Return True if the upstream with this id may have the file. Without a FileHash, only one upstream may."""
        return self.file == upstream or len(self.file) == _FILE_HASH_LENGTH

    def __str__(self) -> str:
        return f"{self.hash_part}-{self.key}"

"""Content addresses, the field `CA` of a narinfo and of the database (Nix `src/libstore/content-address.cc`).

The forms are `text:sha256:HASH`, `fixed:ALGORITHM:HASH`, `fixed:r:…` for a NAR and `fixed:git:…` for a git tree.
A malformed content address makes a Nix client abort, so the server must never send one.
"""

import re
from dataclasses import dataclass

from harmonia.errors import FormatError
from harmonia.nix import hashes
from harmonia.untrusted import excerpt

_FORM = re.compile(r"(text:|fixed:r:|fixed:git:|fixed:)([a-z0-9]+):([0-9A-Za-z+/=]+)")
_METHODS = {"text:": "text", "fixed:r:": "nar", "fixed:git:": "git", "fixed:": "flat"}


@dataclass(frozen=True, slots=True)
class ContentAddress:
    method: str
    algorithm: str
    digest: bytes


def parse(text: str) -> ContentAddress:
    """Return the content address.

    Raises FormatError if it is malformed. The method `text` needs SHA-256, because Nix 2.8 accepts nothing else.
    """
    match = _FORM.fullmatch(text)
    if match is None or (match[1] == "text:" and match[2] != "sha256"):
        raise FormatError(f"malformed content address {excerpt(text)}")
    return ContentAddress(_METHODS[match[1]], match[2], hashes.parse_digest(match[2], match[3]))

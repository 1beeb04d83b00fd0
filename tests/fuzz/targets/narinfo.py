"""Narinfos of other caches: an accepted narinfo can be rendered, and parsing the result gives the same."""

from dataclasses import replace

from harmonia.errors import FormatError
from harmonia.nix import narinfo
from harmonia.nix.signing import PublicKey

WORDS = [b"StorePath: /nix/store/", b"\nURL: ", b"\nCompression: ", b"\nFileHash: sha256:", b"\nFileSize: ", b"\nCA: "]
WORDS += [b"\nNarHash: sha256-", b"\nNarSize: ", b"\nReferences: ", b"\nDeriver: ", b"unknown-deriver", b"\nSig: a:"]

_STORE_DIR = "/nix/store"
_KEY = PublicKey.parse("cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=")


def check(data: bytes) -> bool:
    try:
        info, nar = narinfo.parse(data.decode(), _STORE_DIR)
    except (FormatError, UnicodeDecodeError):
        return False
    assert not _KEY.verify(info.fingerprint(_STORE_DIR), "".join(info.sigs[:1]))
    sigs = narinfo.signatures(info, _STORE_DIR, [])
    again = narinfo.parse(narinfo.render(info, _STORE_DIR, nar, sigs), _STORE_DIR)
    assert again == (replace(info, sigs=tuple(sigs)), nar)
    return True

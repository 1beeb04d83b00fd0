"""narinfo, the metadata of a store path in a binary cache (Nix `src/libstore/nar-info.cc`)."""

import base64
import json
import posixpath
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from harmonia.errors import FormatError
from harmonia.nix import base32, content_address, hashes
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey, is_signature
from harmonia.nix.store_path import StorePath
from harmonia.untrusted import excerpt, integer

CONTENT_TYPE = "text/x-nix-narinfo"

COMPRESSIONS = frozenset(
    ("none", "xz", "bzip2", "gzip", "zstd", "br", "lz4", "lzip", "lzma", "lzop", "compress", "grzip", "lrzip")
)
MAX_URL_LENGTH = 64 << 10
"""Characters. curl accepts 8 million, but servers accept far fewer."""
_URL = re.compile(rf"[^\x00-\x1f\x7f]{{1,{MAX_URL_LENGTH}}}")
_MAX_SIZE = (1 << 64) - 1
_NO_DERIVER = "unknown-deriver"


@dataclass(frozen=True, slots=True)
class NarFile:
    """The file of a NAR in a cache, compressed or not."""

    url: str
    """Relative to the root of the cache, or absolute."""
    compression: str = "none"
    """One of COMPRESSIONS."""
    file_hash: bytes | None = None
    """The SHA-256 of the file as downloaded, or None if it is unknown."""
    file_size: int | None = None
    """The length of the file as downloaded in bytes, or None if it is unknown."""


def signatures(info: PathInfo, store_dir: str, keys: Iterable[SecretKey]) -> list[str]:
    """Return the stored signatures and new ones by our `keys`, sorted and without duplicates.

    Malformed stored signatures are dropped, because Nix ≥ 2.34 refuses a narinfo that has one.
    """
    sigs = {sig for sig in info.sigs if is_signature(sig)}
    fingerprint = info.fingerprint(store_dir)
    sigs.update(key.sign(fingerprint) for key in keys)
    return sorted(sigs)


def render(info: PathInfo, store_dir: str, nar: NarFile, sigs: Iterable[str]) -> str:
    """Return the narinfo's text.

    An empty value also follows a space, because Nix skips the character after a colon without a check.
    """
    lines = [
        f"StorePath: {store_dir}/{info.path}",
        f"URL: {nar.url}",
        f"Compression: {nar.compression}",
    ]
    if nar.file_hash is not None:
        lines.append(f"FileHash: sha256:{base32.encode(nar.file_hash)}")
    if nar.file_size is not None:
        lines.append(f"FileSize: {nar.file_size}")
    lines += [
        f"NarHash: sha256:{base32.encode(info.nar_hash)}",
        f"NarSize: {info.nar_size}",
        f"References: {' '.join(info.references)}",
    ]
    if info.deriver is not None:
        lines.append(f"Deriver: {info.deriver}")
    lines += [f"Sig: {sig}" for sig in sigs]
    if info.ca is not None:
        lines.append(f"CA: {info.ca}")
    return "\n".join(lines) + "\n"


def render_json(info: PathInfo, store_dir: str, nar: NarFile, sigs: Iterable[str]) -> str:
    """Return the narinfo as JSON: version 3 of Nix's *store object info* for a path in a binary cache, plus the path.

    `registrationTime` is always null and `ultimate` false, because a cache does not have these two.
    Raises FormatError if the content address is malformed.
    """
    named = (sig.partition(":") for sig in sigs)
    value = {
        "version": 3,
        "path": info.path,
        "storeDir": store_dir,
        "narHash": _sri("sha256", info.nar_hash),
        "narSize": info.nar_size,
        "references": info.references,
        "ca": info.ca
        and {"method": (ca := content_address.parse(info.ca)).method, "hash": _sri(ca.algorithm, ca.digest)},
        "deriver": info.deriver,
        "registrationTime": None,
        "ultimate": False,
        "signatures": [{"keyName": name, "sig": sig} for name, _, sig in named],
        "url": nar.url,
        "compression": nar.compression,
    }
    if nar.file_hash is not None:
        value["downloadHash"] = _sri("sha256", nar.file_hash)
    if nar.file_size is not None:
        value["downloadSize"] = nar.file_size
    return json.dumps(value) + "\n"


def _sri(algorithm: str, digest: bytes) -> str:
    return f"{algorithm}-{base64.b64encode(digest).decode()}"


def parse(text: str, store_dir: str) -> tuple[PathInfo, NarFile]:
    """Return the path info and the NAR file of a narinfo, parsed exactly as by Nix 2.8 and newer.

    A malformed Sig, and a FileHash in another algorithm than SHA-256, are dropped: some versions of Nix accept them,
    others ignore them. A FileSize of 0 counts as unknown.
    Raises FormatError if Nix would refuse the narinfo, if the path is not in `store_dir`, if the compression is unknown
    or if NarHash is not a SHA-256.
    """
    fields, sigs = _fields(text)
    for name in ("StorePath", "URL", "NarHash", "NarSize"):
        if not fields.get(name):
            raise FormatError(f"the narinfo has no {name}")
    if not _URL.fullmatch(fields["URL"]):
        raise FormatError(f"malformed URL {excerpt(fields['URL'])}")
    compression = fields.get("Compression") or "bzip2"
    if compression not in COMPRESSIONS:
        raise FormatError(f"unknown Compression {excerpt(compression)}")
    algorithm, nar_hash = hashes.parse(fields["NarHash"])
    if algorithm != "sha256":
        raise FormatError("NarHash is not a SHA-256")
    nar_size = _size(fields["NarSize"])
    if not nar_size:
        raise FormatError("NarSize is 0")
    deriver = fields.get("Deriver", _NO_DERIVER)
    if ca := fields.get("CA"):
        content_address.parse(ca)
    info = PathInfo(
        path=StorePath.in_dir(store_dir, _canonical(fields["StorePath"])),
        nar_hash=nar_hash,
        nar_size=nar_size,
        references=tuple(sorted({StorePath(name) for name in fields.get("References", "").split(" ") if name})),
        deriver=None if deriver == _NO_DERIVER else StorePath(deriver),
        sigs=tuple(filter(is_signature, sigs)),
        ca=ca or None,
    )
    algorithm, file_hash = hashes.parse(fields["FileHash"]) if "FileHash" in fields else ("", b"")
    file_size = _size(fields.get("FileSize", "0"))
    return info, NarFile(fields["URL"], compression, file_hash if algorithm == "sha256" else None, file_size or None)


def split(text: str) -> list[str]:
    """Return the narinfos in a text that separates them by empty lines."""
    return [f"{part}\n" for part in text.removesuffix("\n").split("\n\n")] if text else []


def _fields(text: str) -> tuple[dict[str, str], list[str]]:
    """Return the values of the fields by name, the last value of repeated ones, and the signatures.

    Raises FormatError if References or CA is repeated, or a line is malformed.
    """
    fields: dict[str, str] = {}
    sigs: list[str] = []
    for name, value in _lines(text):
        if name in {"References", "CA"} and fields.get(name, "").strip(" "):
            raise FormatError(f"the narinfo has more than one {name}")
        if name == "Sig":
            sigs.append(value)
        else:
            fields[name] = value
    return fields, sigs


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """Yield names and values. Like Nix, skip the character after a colon without a check, even a line end.

    Raises FormatError if a line has no colon or no line end.
    """
    position = 0
    while position < len(text):
        colon = text.find(":", position)
        end = text.find("\n", colon + 2)
        if colon < 0 or end < 0:
            raise FormatError("a line of the narinfo is not `Name: value` with a newline")
        yield text[position:colon], text[colon + 2 : end]
        position = end + 1


def _canonical(path: str) -> str:
    """Return an absolute path without empty, `.` and `..` components, like Nix's `canonPath`."""
    return f"/{posixpath.normpath(path).lstrip('/')}" if path.startswith("/") else path


def _size(text: str) -> int:
    size = integer(text.removeprefix("+"), _MAX_SIZE)
    if size is None:
        raise FormatError(f"malformed size {excerpt(text)}")
    return size

"""narinfo: what a binary cache says of a store path (Nix `src/libstore/nar-info.cc`)."""

import base64
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from harmonia.errors import FormatError
from harmonia.nix import base32
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey, is_signature
from harmonia.nix.store_path import StorePath

CONTENT_TYPE = "text/x-nix-narinfo"

COMPRESSIONS = frozenset(
    ("none", "xz", "bzip2", "gzip", "zstd", "br", "lz4", "lzip", "lzma", "lzop", "compress", "grzip", "lrzip")
)
_HASHES = {"md5": 16, "sha1": 20, "sha256": 32, "sha512": 64, "blake3": 32}
"""Those that Nix knows, and their bytes."""
_HASH = re.compile(rf"({'|'.join(_HASHES)})([:-])(.*)")
_CONTENT_ADDRESS = re.compile(r"(text:|fixed:r:|fixed:git:|fixed:)(.*)")
_METHODS = {"text:": "text", "fixed:r:": "nar", "fixed:git:": "git", "fixed:": "flat"}
_URL = re.compile(r"[!-~]{1,2048}")
_SIZE = re.compile(r"[0-9]{1,19}", re.ASCII)


@dataclass(frozen=True, slots=True)
class NarFile:
    """A NAR as a cache hands it out. Its hash and size are of the file as downloaded, None until they are known."""

    url: str
    compression: str = "none"
    file_hash: bytes | None = None
    file_size: int | None = None


def signatures(info: PathInfo, store_dir: str, keys: Iterable[SecretKey]) -> list[str]:
    """The stored signatures and those of our `keys`, sorted, each once.

    A stored one that Nix ≥ 2.34 would trip over is left out.
    """
    sigs = {sig for sig in info.sigs if is_signature(sig)}
    fingerprint = info.fingerprint(store_dir)
    sigs.update(key.sign(fingerprint) for key in keys)
    return sorted(sigs)


def render(info: PathInfo, store_dir: str, nar: NarFile, sigs: Iterable[str]) -> str:
    """The narinfo's text.

    Its reader blindly skips the character after a colon, so that even an empty value has its space.
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
    """The same in JSON: version 3 of Nix's *store object info*, of a path in a binary cache, with the path itself.

    Of it, no cache knows when it was registered, or who built it. FormatError where its content address is none.
    """
    named = (sig.partition(":") for sig in sigs)
    value = {
        "version": 3,
        "path": info.path,
        "storeDir": store_dir,
        "narHash": _sri("sha256", info.nar_hash),
        "narSize": info.nar_size,
        "references": info.references,
        "ca": info.ca and _content_address(info.ca),
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


def _content_address(text: str) -> dict[str, str]:
    """Nix `src/libstore/content-address.cc`."""
    match = _CONTENT_ADDRESS.fullmatch(text)
    if match is None:
        raise FormatError(f"{text!r} is no content address")
    return {"method": _METHODS[match[1]], "hash": _sri(*_hash(match[2]))}


def _sri(algorithm: str, digest: bytes) -> str:
    return f"{algorithm}-{base64.b64encode(digest).decode()}"


def parse(text: str, store_dir: str) -> tuple[PathInfo, NarFile]:
    """What a narinfo says. FormatError where a Nix of any version would refuse it, and where it is no help:
    where it tells of a path in another store, or has an unknown compression or a hash other than SHA-256.

    As for Nix, the last of several values counts, unknown fields are skipped, and no compression is bzip2.
    """
    fields, sigs = _fields(text)
    for name in ("StorePath", "URL", "NarHash", "NarSize"):
        if not fields.get(name):
            raise FormatError(f"a narinfo has no {name}")
    if not _URL.fullmatch(fields["URL"]):
        raise FormatError("the URL in a narinfo is none")
    compression = fields.get("Compression") or "bzip2"
    if compression not in COMPRESSIONS:
        raise FormatError("the Compression in a narinfo is unknown")
    nar_size = _size(fields["NarSize"])
    if not nar_size:
        raise FormatError("the NarSize in a narinfo is 0")
    deriver = fields.get("Deriver", "")
    info = PathInfo(
        path=StorePath.in_dir(store_dir, fields["StorePath"]),
        nar_hash=_sha256(fields["NarHash"]),
        nar_size=nar_size,
        references=tuple(sorted({StorePath(name) for name in fields.get("References", "").split(" ") if name})),
        deriver=StorePath(deriver) if deriver not in {"", "unknown-deriver"} else None,
        sigs=tuple(sigs),
        ca=fields.get("CA") or None,
    )
    file_hash = _sha256(fields["FileHash"]) if fields.get("FileHash") else None
    file_size = _size(fields["FileSize"]) if fields.get("FileSize") else None
    return info, NarFile(fields["URL"], compression, file_hash, file_size)


def _fields(text: str) -> tuple[dict[str, str], list[str]]:
    """The values that count, by their names, and the signatures."""
    if not text.endswith("\n"):
        raise FormatError("a narinfo ends with a newline")
    fields: dict[str, str] = {}
    sigs = []
    for line in text[:-1].split("\n"):
        name, colon, value = line.partition(": ")
        if not colon or "\r" in value:
            raise FormatError("a line of a narinfo has the form Name: value")
        if name in {"References", "CA"} and fields.get(name):
            raise FormatError(f"a narinfo has more than one {name}")
        if name == "Sig":
            sigs.append(value)
        else:
            fields[name] = value
    if not all(map(is_signature, sigs)):
        raise FormatError("a signature in a narinfo is malformed")
    return fields, sigs


def _size(text: str) -> int:
    if not _SIZE.fullmatch(text):
        raise FormatError("a size in a narinfo is no number")
    return int(text)


def _sha256(text: str) -> bytes:
    algorithm, value = _hash(text)
    if algorithm != "sha256":
        raise FormatError("a hash in a narinfo is no SHA-256")
    return value


def _hash(text: str) -> tuple[str, bytes]:
    """The algorithm and the digest, which is in base 32, in hex, in base 64, or as SRI (Nix `src/libutil/hash.cc`)."""
    algorithm, separator, digest = match.groups() if (match := _HASH.fullmatch(text)) else ("", "", "")
    size = _HASHES.get(algorithm)
    try:
        if size and len(digest) == base32.encoded_length(size) and separator == ":":
            value = base32.decode(digest)
        elif size and len(digest) == 2 * size and separator == ":":
            value = bytes.fromhex(digest)
        else:
            value = base64.b64decode(digest, validate=True)
    except ValueError:
        value = b""
    if len(value) != size:
        raise FormatError("a hash in a narinfo is none")
    return algorithm, value

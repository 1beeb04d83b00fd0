"""narinfo: what a binary cache says of a store path (Nix `src/libstore/nar-info.cc`)."""

from collections.abc import Iterable
from dataclasses import dataclass

from harmonia.nix import base32
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey, is_signature

CONTENT_TYPE = "text/x-nix-narinfo"


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

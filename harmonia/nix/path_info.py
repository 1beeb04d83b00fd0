"""Path info, the record of a valid path in the store's database (Nix `src/libstore/path-info.cc`)."""

from dataclasses import dataclass

from harmonia.nix import base32
from harmonia.nix.store_path import StorePath


@dataclass(frozen=True, slots=True)
class PathInfo:
    path: StorePath
    nar_hash: bytes
    """The SHA-256 of the path's NAR, 32 bytes."""
    nar_size: int
    """The NAR's length in bytes, never 0."""
    references: tuple[StorePath, ...] = ()
    """The sorted paths that this path refers to, which may include the path itself."""
    deriver: StorePath | None = None
    """The derivation that built the path, or None if it is unknown."""
    sigs: tuple[str, ...] = ()
    """The stored signatures, each as `name:base64`."""
    ca: str | None = None
    """The content address, or None if the path is not content-addressed."""

    def fingerprint(self, store_dir: str) -> bytes:
        """Return the message that a signature signs: the path, its NAR hash and size, and its references.

        All paths are full ones, in `store_dir`.
        """
        references = ",".join(f"{store_dir}/{reference}" for reference in self.references)
        nar_hash = base32.encode(self.nar_hash)
        return f"1;{store_dir}/{self.path};sha256:{nar_hash};{self.nar_size};{references}".encode()

"""What a store's database knows of a valid path (Nix `src/libstore/path-info.cc`)."""

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
    """The paths it refers to, itself perhaps among them, sorted."""
    deriver: StorePath | None = None
    sigs: tuple[str, ...] = ()
    """`name:base64` each, as they are stored."""
    ca: str | None = None
    """How the path follows from its content, for a content-addressed one."""

    def fingerprint(self, store_dir: str) -> bytes:
        """What a signature signs: the path, its content and its references as full paths."""
        references = ",".join(f"{store_dir}/{reference}" for reference in self.references)
        nar_hash = base32.encode(self.nar_hash)
        return f"1;{store_dir}/{self.path};sha256:{nar_hash};{self.nar_size};{references}".encode()

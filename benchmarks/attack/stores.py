"""Store under attack: created once, and kept for the next run."""

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.store import made_once
from harmonia.nix.path_info import PathInfo
from harmonia.store.store import Store
from harmonia.tools.store_builder import StoreBuilder

_VERSION = 1  # increase it to create the store again
_SMALL = 40
MIB = 1 << 20


@dataclass(frozen=True)
class Form:
    """Size of the attacks."""

    name: str
    ranged: int
    """Number of files in the path whose small ranges are requested."""
    read: int
    """Number of files in the path that is read slowly."""
    paged: int
    """Number of entries in the directory whose page and listing are requested."""
    readers: int
    cuts: int
    kills: int
    """Number of times that the server is killed with SIGKILL."""
    seconds: float
    """Duration of one attack."""
    quiet_s: float
    """Duration of the measurement before the attack."""
    max_wait_ms: float
    """Bound for the p99 of the bystander's narinfos."""


FULL = Form(
    "full", 500_000, 1_000_000, 100_000, readers=200, cuts=10_000, kills=40, seconds=20, quiet_s=4, max_wait_ms=100
)
# A wider bound, because 19 of the 300 narinfos in 3 s are first requests of the bystander, which wait longest.
SHORT = Form("short", 50_000, 100_000, 20_000, readers=64, cuts=500, kills=3, seconds=3, quiet_s=1, max_wait_ms=300)


class AttackedStore:
    def __init__(self, directory: Path, form: Form) -> None:
        self.root = made_once(directory / f"{form.name}-{_VERSION}", partial(_fill, form))
        store = Store("/nix/store", f"{self.root}/nix/store", f"{self.root}/nix/var/nix/db/db.sqlite")
        hash_parts = [path.removeprefix("/nix/store/")[:32] for path in store.valid_paths()[0]]
        infos = {info.path.name: info for hash_part in hash_parts if (info := store.path_info(hash_part))}
        self.ranged, self.read, self.paged = infos.pop("ranged"), infos.pop("read"), infos.pop("paged")
        self.random = infos.pop("random")
        self.small = list(infos.values())


def narinfo(info: PathInfo) -> str:
    return f"/{info.path.hash_part}.narinfo"


def _fill(form: Form, root: Path) -> None:
    builder = StoreBuilder(root)
    for name in ("ranged", "read", "paged"):
        files = {f"{number:07}-{name}-file-of-many": b"" for number in range(getattr(form, name))}
        builder.add(builder.output_path(name), files)
    builder.add(builder.output_path("random"), random.Random(1).randbytes(2 * MIB))
    add_small(builder)


def add_small(builder: StoreBuilder) -> None:
    """Add the small paths that the other client downloads. In each store, they have the same hash parts."""
    for number in range(_SMALL):
        builder.add(builder.output_path(f"small-{number}"), f"{number}\n".encode() * 1000)

"""The store that is attacked: made once, and kept for the next run."""

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.store import made_once
from harmonia.nix.path_info import PathInfo
from harmonia.store.store import Store
from harmonia.tools.store_builder import StoreBuilder

_VERSION = 1  # of what is made here: another one makes it anew
_SMALL = 40
MIB = 1 << 20


@dataclass(frozen=True)
class Form:
    """How much is done."""

    name: str
    ranged: int
    """Files of the path of which small ranges are asked."""
    read: int
    """Files of the path that is read slowly."""
    paged: int
    """Entries of the directory whose page and listing are asked for."""
    readers: int
    cuts: int
    kills: int
    """Of the server, by kill -9."""
    seconds: float
    """Of one attack."""
    quiet_s: float
    """Of the measurement before it."""
    max_wait_ms: float
    """For 99 of 100 narinfos of the bystander."""


FULL = Form(
    "full", 500_000, 1_000_000, 100_000, readers=200, cuts=10_000, kills=40, seconds=20, quiet_s=4, max_wait_ms=100
)
# Its bound is wider: of 300 narinfos in 3 s, 19 are asked for by the bystander for the first time, and wait longest.
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
    for number in range(_SMALL):
        builder.add(builder.output_path(f"small-{number}"), f"{number}\n".encode() * 1000)

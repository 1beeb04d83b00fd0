"""A database with any damage: its values are usable, or raise an error of ours."""

import os
import tempfile

from harmonia.errors import StoreObjectError, StoreUnavailableError
from harmonia.nix import narinfo
from harmonia.nix.narinfo import NarFile
from harmonia.store import queries
from harmonia.store.store import Store

WORDS = [b"/nix/store/", b"sha256:", b"SQLite format 3\0", b"ValidPaths", b"Refs", b"\x0d", b"\x05", b"\x0a"]
LONGEST = 32 * 1024

HASH_PARTS = ["0123456789abcdfghijklmnpqrsvwxyz", "1123456789abcdfghijklmnpqrsvwxyz"]

_DIRECTORY = tempfile.mkdtemp()
_FILE = os.path.join(_DIRECTORY, "db.sqlite")


def check(data: bytes) -> bool:
    with open(_FILE, "wb") as file:
        file.write(data)
    store = Store("/nix/store", "/nix/store", _FILE, timeout=0)
    try:
        used = [_is_used(store, hash_part) for hash_part in HASH_PARTS]
    finally:
        store.database.close()
    return any(used)


def _is_used(store: Store, hash_part: str) -> bool:
    try:
        info = store.path_info(hash_part)
        if info is None:
            return False
        text = narinfo.render(info, "/nix/store", NarFile("nar/x"), narinfo.signatures(info, "/nix/store", []))
        narinfo.parse(text, "/nix/store")
        assert info.path.hash_part == hash_part
        store.realisation("sha256:0", "out")
        store.build_trace("a.drv", "out")
        store.valid_paths()
        queries.search(store, "name", 10)
        queries.referrers(store, info.path, 10)
        queries.outputs(store, info.path)
        queries.closure_size(store, info.path)
    except (StoreObjectError, StoreUnavailableError):
        return False
    return True

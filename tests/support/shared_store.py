"""The store that the server tests share, and functions to read it."""

import re

from harmonia.nix.path_info import PathInfo
from harmonia.store import file_reader, tree_reader
from harmonia.store.store import Store
from harmonia.tools.fixture_tree import Executable, Symlink, Tree
from harmonia.tools.store_builder import StoreBuilder
from support.running import Server

BIG = bytes(range(256)) * 4096 * 3
"""Content larger than socket buffers: 3 MiB."""


TREE: Tree = {
    b"\xff\xfe": b"not UTF-8",
    "bin": {"run": Executable(b"#!/bin/sh\n"), "link": Symlink("run")},
    "big": BIG,
    "empty": b"",
    "empty-dir": {},
}


def info(store: StoreBuilder, name: str) -> PathInfo:
    """Return the database entry of the path with that name, found by our own SQL."""
    with store.connect() as connection:
        [(path,)] = connection.execute("select path from ValidPaths where path like ?", (f"%-{name}",))
    found = Store(store.store_dir, store.real_dir, store.db_path).path_info(path.removeprefix("/nix/store/")[:32])
    assert found
    return found


def url(server: Server, hash_part: str) -> str:
    """Return the URL path of the plain NAR, derived from the one in the narinfo."""
    for line in server.get(f"/{hash_part}.narinfo").text.splitlines():
        if line.startswith("URL: "):
            return re.sub(r"-zstd-.*", ".nar", "/" + line.removeprefix("URL: "))
    raise AssertionError("no URL")


def dump(store: StoreBuilder, name: str) -> bytes:
    return b"".join(file_reader.read(tree_reader.dump(store.real_path(info(store, name).path))))

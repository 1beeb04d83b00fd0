"""Store paths with debug info."""

from harmonia.nix.path_info import PathInfo
from harmonia.tools.fixture_tree import Tree
from harmonia.tools.store_builder import StoreBuilder

ONE, TWO, OTHER = "11" * 20, "22" * 20, "33" * 20


def tree(*ids: str) -> Tree:
    directories: dict[str, dict[str, bytes]] = {}
    for each in ids:
        directories.setdefault(each[:2], {})[f"{each[2:]}.debug"] = each.encode()
    return {"lib": {"debug": {".build-id": directories}}}


def add(builder: StoreBuilder, name: str, *ids: str) -> PathInfo:
    return builder.add(builder.output_path(name), tree(*ids))


def add_rows(builder: StoreBuilder, count: int) -> None:
    """Register paths that do not exist on disk."""
    rows = ((f"/nix/store/{number:032}-path", "sha256:00") for number in range(count))
    with builder.connect() as connection:
        connection.executemany("insert into ValidPaths (path, hash, registrationTime) values (?, ?, 1)", rows)

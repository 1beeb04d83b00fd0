"""A small store, and a server for it that the tests of one file share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from harmonia.nix.signing import SecretKey
from harmonia.tools.store_builder import StoreBuilder
from support.running import KNOWN_LENGTHS, Server
from support.shared_store import TREE


@pytest.fixture(scope="session")
def keys() -> list[SecretKey]:
    return [SecretKey.generate(name) for name in ("one.example-1", "two.example-1")]


@pytest.fixture
def store(tmp_path: Path) -> StoreBuilder:
    return StoreBuilder(tmp_path / "store")


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> StoreBuilder:
    """Build a store that many tests read: `tree` refers to `dep` and to itself, and has a deriver and a signature."""
    store = StoreBuilder(tmp_path_factory.mktemp("shared") / "store")
    dep = store.add_source("dep", b"a single file").path
    derivation, output = store.add_derivation("tree", "/bin/sh")
    store.add(output, TREE, references=[dep, output], deriver=derivation.path, keys=[SecretKey.generate("stored-1")])
    return store


@pytest.fixture(scope="module")
def server(
    shared_store: StoreBuilder, keys: list[SecretKey], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("server")
    for key in keys:
        (directory / key.name).write_text(key.export())
        (directory / key.name).chmod(0o600)
    running = Server(
        directory / "running",
        Path(shared_store.real_dir).parents[1],
        f"sign_key_paths = {[str(directory / key.name) for key in keys]}",
        program=KNOWN_LENGTHS,
    )
    running.start()
    yield running
    assert running.stop() == 0
    assert not [line for line in running.log if "Traceback" in line]

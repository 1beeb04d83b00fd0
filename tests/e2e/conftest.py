"""Fixtures with real Nix clients. Tests with a missing version of Nix are skipped, with the reason."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.closure import Closure, make_closure, make_sparse
from support.nix_client import NIXES, Client, Nix
from support.push_target import Target
from support.running import Server

_HOST, *_NEWER = NIXES


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Return a short path, because paths of sockets have at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="harmonia-", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


@pytest.fixture(
    params=[
        pytest.param(_HOST, id=_HOST.name, marks=pytest.mark.nix),
        *(pytest.param(nix, id=nix.name, marks=pytest.mark.newer_nix) for nix in _NEWER),
    ]
)
def nix(request: pytest.FixtureRequest) -> Nix:
    """Yield each version of Nix in turn."""
    chosen: Nix = request.param
    if chosen.missing is not None:
        pytest.skip(chosen.missing)
    return chosen


@pytest.fixture
def make_client(nix: Nix, tmp_path: Path) -> Callable[[str], Client]:
    """Return a function that makes a fresh client in tmp_path / name; its commands see all of tmp_path."""
    return lambda name: Client(nix, tmp_path / name)


@pytest.fixture
def client(make_client: Callable[[str], Client]) -> Client:
    return make_client("client")


@pytest.fixture(scope="session")
def closure(tmp_path_factory: pytest.TempPathFactory) -> Closure:
    """Build a realistic closure, once, with the first available Nix. Tests copy from it and never change it."""
    usable = next((nix for nix in NIXES if nix.missing is None), None)
    if usable is None:
        pytest.skip(str(NIXES[0].missing))
    return make_closure(Client(usable, tmp_path_factory.mktemp("closure") / "server"))


@pytest.fixture(scope="session")
def sparse_path(closure: Closure) -> str:
    """Build a path of 5 GiB in the closure's store. Only for tests that need it: hashing takes ten seconds or more."""
    return make_sparse(closure.server)


@pytest.fixture
def target(make_client: Callable[[str], Client], start: Callable[..., Server]) -> Target:
    client = make_client("store")
    client.run("nix-store", "--init")
    key = make_client("keys").generate_key("pusher-1")
    client.settings |= {"trusted-users": "nobody-at-all", "trusted-public-keys": key.public}
    return Target(client, key, start)


@pytest.fixture
def pusher(make_client: Callable[[str], Client]) -> Client:
    pusher = make_client("pusher")
    pusher.settings["netrc-file"] = str(pusher.shared / "netrc")
    return pusher

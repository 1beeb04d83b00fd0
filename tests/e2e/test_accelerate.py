"""A Harmonia on the client's machine, started by its socket: Nix substitutes through it, and needs it not at all."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from harmonia.nix.path_info import PathInfo
from harmonia.tools.store_builder import StoreBuilder
from support.activation import SocketUnit
from support.nix_client import Client
from support.running import Server
from support.upstream_paths import KEY, entry

Start = Callable[..., Server]
MakeClient = Callable[[str], Client]

COUNT = 30


@pytest.fixture
def top(tmp_path: Path) -> PathInfo:
    """Build a store of a closure in which each path refers to some earlier ones. Return the last path."""
    store = StoreBuilder(tmp_path / "origin-store")
    chosen = random.Random(24)
    infos: list[PathInfo] = []
    for number in range(COUNT):
        earlier = infos[-1:] + chosen.sample(infos, min(number, 2))
        references = {info.path for info in earlier}
        content = chosen.randbytes(chosen.randrange(200_000))
        infos.append(store.add(store.output_path(f"path-{number}"), content, references=references, keys=[KEY]))
    return infos[-1]


@pytest.fixture
def origin(start: Start, tmp_path: Path, top: PathInfo) -> Server:
    del top  # made before the server starts
    return start(store=tmp_path / "origin-store", settings="access_log = true")


def unit_of(client: Client, origin: Server) -> SocketUnit:
    """Return the unit of an accelerator, with settings like those of `services.harmonia.client.accelerate`.

    The timeout is longer, for a busy machine.
    """
    settings = f"priority = 10\nenable_compression = false\nidle_exit = 60\nupstream_timeout = 60.0\n{entry(origin)}"
    return SocketUnit(client.shared / f"unit-{client.directory.name}", client.directory, settings)


def configure(client: Client, *urls: str) -> None:
    client.settings |= {
        "substituters": " ".join(urls),
        "trusted-public-keys": str(KEY.public_key),
        "fallback": "true",
    }


def test_closure_comes_through_the_accelerator(client: Client, origin: Server, top: PathInfo) -> None:
    client.run("nix-store", "--init")
    with unit_of(client, origin) as unit:
        configure(client, unit.url, origin.url)
        client.run("nix-store", "--realise", f"/nix/store/{top.path}")
        client.run("nix-store", "--verify-path", f"/nix/store/{top.path}")
        [server] = unit.servers
        assert sum("GET /" in line for line in origin.log if ".narinfo" in line) == 1
        assert not [line for line in server.log if "Traceback" in line or "ERROR" in line]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_accelerator_breaks_no_build(make_client: MakeClient, origin: Server, top: PathInfo) -> None:
    """Set KILLS=100 for a run of twelve minutes."""
    builds = killed = 0
    while killed < int(os.environ.get("KILLS", "3")):
        client = make_client(f"client-{builds}")
        client.run("nix-store", "--init")
        with unit_of(client, origin) as unit:
            configure(client, unit.url, origin.url)
            with unit.killed_at_random():
                client.run("nix-store", "--realise", f"/nix/store/{top.path}", timeout=250)
            killed += unit.kills
        client.run("nix-store", "--verify-path", f"/nix/store/{top.path}")
        builds += 1


def test_stopped_accelerator_leaves_the_build_to_the_cache_itself(
    client: Client, origin: Server, top: PathInfo
) -> None:
    """The socket is closed, too. Nix has never heard of the accelerator, or finds out when it opens the caches."""
    client.run("nix-store", "--init")
    with unit_of(client, origin) as unit:
        url = unit.url
    configure(client, url, origin.url)
    client.run("nix-store", "--realise", f"/nix/store/{top.path}")


def test_accelerator_that_is_stopped_after_use_breaks_no_build(client: Client, origin: Server, top: PathInfo) -> None:
    """Nix remembers that it is a cache, so it does not find out when it opens the caches."""
    if client.nix.version < (2, 26):
        pytest.skip("this Nix aborts if a substituter fails, even with fallback; use a newer one")
    client.run("nix-store", "--init")
    with unit_of(client, origin) as unit:
        configure(client, unit.url, origin.url)
        first = min(top.references)
        client.run("nix-store", "--realise", f"/nix/store/{first}")
    client.run("nix-store", "--realise", f"/nix/store/{top.path}")
    client.run("nix-store", "--verify-path", f"/nix/store/{top.path}")

"""`nix log` shows the output of the builder, from every stored form."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.closure import build_one, instantiate
from support.nix_client import Client
from support.running import PATIENCE_S, Server, wait_until

Start = Callable[..., Server]
MakeClient = Callable[[str], Client]

IMMUTABLE = "public, max-age=31536000, immutable"
ODD = "c++-q?z=1"


@pytest.fixture
def store(make_client: MakeClient) -> Client:
    """Return the client whose store is served."""
    return make_client("store")


def derivation(store: Client, path: str) -> str:
    return store.run("nix-store", "--query", "--deriver", path).text


@contextmanager
def building(store: Client, built: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a build that runs until it ends or is killed."""
    command = store.command("nix-store", "--realise", built)
    with subprocess.Popen(
        command, env=store.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as build:
        try:
            yield build
        finally:
            build.kill()


def url(path: str) -> str:
    return f"/log/{os.path.basename(path)}"


def log(client: Client, server: Server, path: str) -> str:
    """Return the output of `nix log`, or its error messages if it fails."""
    result = client.run("nix", "log", "--store", server.url, path, check=False)
    return result.text if result.returncode == 0 else result.stderr


@pytest.mark.parametrize("compressed", ["true", "false"])
@pytest.mark.parametrize("name", ["said-1.0", ODD])
def test_nix_log_shows_the_output_of_the_builder(
    start: Start, store: Client, client: Client, compressed: str, name: str
) -> None:
    store.settings["compress-build-log"] = compressed
    path = build_one(store, name, "seq 100000; echo said > $out")
    server = start(store=store.directory)
    said = "\n".join(map(str, range(1, 100_001)))
    assert log(client, server, path) == said
    assert log(client, server, derivation(store, path)) == said


def test_nix_log_works_after_the_derivation_is_collected(start: Start, store: Client, client: Client) -> None:
    """`nix log` up to 2.8 first requests the derivation, and fails without it."""
    path = build_one(store, "collected-1.0", "echo collected; echo > $out")
    built = derivation(store, path)
    store.run("nix-collect-garbage")
    server = start(store=store.directory)
    assert server.get(url(built)).body == b"collected\n"
    if client.nix.version >= (2, 26):
        assert log(client, server, built) == "collected"


def test_substituted_path_has_no_log(start: Start, store: Client, client: Client) -> None:
    path = store.run("nix-store", "--add", "/etc/passwd").text
    server = start(store=store.directory)
    assert "is not available" in log(client, server, path)
    assert not [line for line in server.log if "ERROR" in line]


def test_nix_log_follows_the_redirect_to_another_server(start: Start, store: Client, client: Client) -> None:
    """The other server stands for Hydra, whose page /log/<drv> has the text of the log."""
    path = build_one(store, "redirected-1.0", "echo redirected; echo > $out")
    elsewhere = store.directory / "hydra"
    (store.log_dir / "drvs").rename(elsewhere)
    hydra = start(store=store.directory, settings=f"log_dir = '{elsewhere}'")
    server = start(store=store.directory, settings=f"log_redirect = '{hydra.url}/log'")
    assert server.get(url(derivation(store, path))).status == 307
    assert log(client, server, path) == "redirected"
    assert log(client, server, derivation(store, path)) == "redirected"


@pytest.mark.parametrize("compressed", ["true", "false"])
def test_log_of_a_running_build_is_served_and_grows(
    start: Start, store: Client, tmp_path: Path, compressed: str
) -> None:
    """It is served from the beginning, and must not be cached."""
    store.settings["compress-build-log"] = compressed
    go, said = tmp_path / "go", tmp_path / "said"
    script = f"seq 500000; touch {said}; until [ -e {go} ]; do sleep 0.05; done; echo done; echo > $out"
    built = instantiate(store, "slow-1.0", script)
    server = start(store=store.directory)
    assert server.get(url(built)).status == 404
    text = "".join(f"{number}\n" for number in range(1, 500_001)) + "done\n"
    with building(store, built) as build:
        wait_until(said.exists)
        wait_until(lambda: server.get(url(built)).body)
        running = server.get(url(built))
        go.touch()
        assert build.wait(PATIENCE_S) == 0
    assert running.headers["cache-control"] == "no-cache"
    assert running.text != text
    assert text.startswith(running.text)
    finished = server.get(url(built), {"If-None-Match": running.headers["etag"]})
    assert (finished.status, finished.text) == (200, text)
    assert finished.headers["cache-control"] == (IMMUTABLE if compressed == "true" else "no-cache")


def test_log_of_a_killed_build_must_not_be_cached(start: Start, store: Client) -> None:
    built = instantiate(store, "killed-1.0", "seq 500000; exec sleep 1000")
    server = start(store=store.directory)
    with building(store, built):
        wait_until(lambda: server.get(url(built)).status == 200 and server.get(url(built)).body)
    answer = server.get(url(built))
    assert (answer.status, answer.headers["cache-control"]) == (200, "no-cache")
    assert answer.text.startswith("1\n2\n3\n")

"""Nix clients get compressed NARs: as resumable files, or by Content-Encoding if they accept it."""

import re
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest

from support.closure import Closure, build_one, requisites
from support.cutting_proxy import CuttingProxy
from support.nix_client import Client
from support.running import NO_SMALL_NARS, Server, wait_until

Start = Callable[..., Server]
MakeClient = Callable[[str], Client]

SIZE = 12_000_000  # of an incompressible file, which takes two frames


def fetch(client: Client, url: str, path: str, public_key: str) -> None:
    """Substitute a closure, and check it."""
    client.settings |= {"substituters": url, "trusted-public-keys": public_key}
    client.run("nix-store", "--realise", path)
    client.run("nix-store", "--verify-path", *requisites(client, path))
    client.run("nix", "store", "verify", "--recursive", path)


def sent(server: Server) -> list[tuple[str, int]]:
    """Return the URLs of the sent NARs, each with the number of sent bytes."""
    lines = (re.search(r"'GET (/nar/\S+)' 20[06] (\d+) ", line) for line in server.log)
    return [(line[1], int(line[2])) for line in lines if line]


def is_cached(server: Server, number: int = 1) -> bool:
    files = list((server.cache_dir / "nar").iterdir())
    return len(files) == number and not any(file.suffix == ".growing" for file in files)


@pytest.mark.parametrize("offered", ["zstd", "none"])
def test_closure_is_substituted_compressed(
    start: Start, make_client: MakeClient, closure: Closure, offered: str
) -> None:
    settings = f"nar_compression = '{offered}'\nsign_key_paths = ['{closure.key.secret_file}']\naccess_log = true"
    server = start(store=closure.server.directory, settings=settings, program=NO_SMALL_NARS)
    paths = requisites(closure.server, closure.top)
    plain = sum(map(int, closure.server.run("nix-store", "--query", "--size", *paths).lines))
    different = len(set(closure.server.run("nix-store", "--query", "--hash", *paths).lines))
    for state in ("cold", "again", "cached"):  # a small NAR is cached when it is compressed the second time
        client = make_client(state)
        del server.log[:]
        fetch(client, server.url, closure.top, closure.key.public)
        wait_until(lambda: len(sent(server)) == len(paths))
        assert {url.endswith(".nar.zst") for url, _ in sent(server)} == {offered == "zstd"}
        on_the_wire = sum(size for _, size in sent(server))
        if offered == "zstd":
            if state != "cold":
                wait_until(lambda: is_cached(server, different))
            assert on_the_wire < plain / 3
        elif client.nix.version >= (2, 14):  # newer versions send Accept-Encoding
            assert on_the_wire < plain / 3
        else:
            assert on_the_wire == plain


@pytest.mark.parametrize("is_warm", [True, False])
def test_download_survives_a_bad_network(start: Start, make_client: MakeClient, *, is_warm: bool) -> None:
    """Nix resumes until the NAR is complete, even if the file is evicted and compressed again."""
    store, client = make_client("store"), make_client("client")
    path = build_one(store, "random-1.0", f"head -c {SIZE} /dev/urandom > $out")
    key = store.generate_key("random-1")
    server = start(store=store.directory, settings=f"sign_key_paths = ['{key.secret_file}']\naccess_log = true")
    port = urlsplit(server.url).port
    assert port

    def evict() -> None:
        for file in (server.cache_dir / "nar").iterdir():
            file.unlink(missing_ok=True)  # a growing file may get its final name meanwhile

    if is_warm:
        fetch(make_client("first"), server.url, path, key.public)
        wait_until(lambda: is_cached(server))
    # Nix tries five times, with increasing delays.
    with CuttingProxy(port, SIZE // 4, SIZE // 2, (lambda: None) if is_warm else evict) as proxy:
        fetch(client, proxy.url, path, key.public)
    assert 2 <= proxy.cuts <= 4
    server.wait_for_log(r"'GET /nar/\S+\.nar\.zst' 206 ")

"""Nix clients substitute through the server from a static cache or another Harmonia, with verified signatures."""

import hashlib
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import zstandard

from harmonia.nix import base32
from harmonia.tools.store_builder import StoreBuilder
from support.closure import Closure, build_one
from support.cutting_proxy import CuttingProxy
from support.nginx import nginx
from support.nix_client import Client
from support.running import Server, wait_until

Start = Callable[..., Server]
Static = Callable[[str], Path]

MEBIBYTE = 1 << 20


@pytest.fixture(scope="session")
def static(closure: Closure, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that makes a static cache of the closure, once for each compression. Tests never change it."""

    @cache
    def make(compression: str) -> Path:
        directory = tmp_path_factory.mktemp("static") / compression
        push(closure, closure.top, compression, directory)
        return directory

    return make


def push(closure: Closure, path: str, compression: str, directory: Path) -> None:
    """Make a signed static cache of a closure with `nix copy --to file://`."""
    server = closure.server
    inside = f"/tmp/{directory.name}"  # inside the machine of the client
    url = f"file://{inside}?compression={compression}&secret-key={closure.key.secret_file}&write-nar-listing=true"
    server.run("nix", "copy", "--to", url, path)
    shutil.move(server.directory / inside[1:], directory)


def serve(start: Start, tmp_path: Path, url: str, public_key: str, settings: str = "") -> Server:
    """Start a server with an empty store and this upstream."""
    if not (tmp_path / "empty").exists():
        StoreBuilder(tmp_path / "empty").add_text("here", b"here\n")
    entry = f"[[upstream]]\nurl = '{url}'\npublic_keys = ['{public_key}']\n{settings}"
    server = start(store=tmp_path / "empty", settings=f"upstream_timeout = 60.0\n{entry}")
    wait_until(lambda: ": up\n" in server.get("/health?verbose").text)
    return server


def fetch(client: Client, url: str, public_key: str, path: str) -> None:
    client.settings |= {"substituters": url, "trusted-public-keys": public_key}
    client.run("nix-store", "--realise", path)
    requisites = client.run("nix-store", "--query", "--requisites", path).lines
    client.run("nix-store", "--verify-path", *requisites)


@pytest.mark.parametrize("mode", ["proxy", "redirect"])
@pytest.mark.parametrize("compression", ["xz", "zstd", "none"])
def test_closure_is_substituted_from_a_static_cache(
    start: Start,
    make_client: Callable[[str], Client],
    closure: Closure,
    static: Static,
    tmp_path: Path,
    *,
    compression: str,
    mode: str,
) -> None:
    with nginx(tmp_path / "nginx", f"root {static(compression)};") as (url, log):
        server = serve(start, tmp_path, url, closure.key.public.strip(), f"mode = '{mode}'\n")
        for name in ("one", "two"):
            fetch(make_client(name), server.url, closure.key.public, closure.top)
        listing = f"/{closure.top.removeprefix('/nix/store/')[:32]}.ls"
        assert server.get(listing).body == (static(compression) / listing[1:]).read_bytes()
        asked = [line.split('"')[1] for line in log.read_text().splitlines()]
    nars = [line for line in asked if line.startswith("GET /nar/")]
    # Once for both clients, and for identical NARs.
    assert (len(nars) == len(set(nars))) is (mode == "proxy")


def test_closure_is_substituted_after_a_restart_without_the_upstream(
    start: Start,
    make_client: Callable[[str], Client],
    closure: Closure,
    static: Static,
    tmp_path: Path,
    new_port: Callable[[], int],
) -> None:
    key = closure.key.public.strip()
    with nginx(tmp_path / "nginx", f"root {static('xz')};", port=new_port()) as (url, _):
        server = serve(start, tmp_path, url, key)
        fetch(make_client("one"), server.url, closure.key.public, closure.top)
        paths = len(list(static("xz").glob("*.narinfo")))
        wait_until(lambda: len(list((server.cache_dir / "narinfo").iterdir())) == paths)
        server.stop()
    entry = f"[[upstream]]\nurl = '{url}'\npublic_keys = ['{key}']\n"
    again = start(store=tmp_path / "empty", settings=entry, cache_dir=server.cache_dir)
    fetch(make_client("two"), again.url, closure.key.public, closure.top)


def test_bad_network_to_the_upstream_does_not_affect_clients(
    start: Start, client: Client, closure: Closure, tmp_path: Path
) -> None:
    path = build_one(closure.server, "noise-1.0", "mkdir $out; head -c 24000000 /dev/urandom > $out/noise")
    push(closure, path, "zstd", tmp_path / "static")
    with nginx(tmp_path / "nginx", f"root {tmp_path}/static;") as (url, _):
        port = int(url.rpartition(":")[2])
        with CuttingProxy(port, 2 * MEBIBYTE, 8 * MEBIBYTE) as network:
            server = serve(start, tmp_path, network.url, closure.key.public.strip())
            fetch(client, server.url, closure.key.public, path)
            assert network.cuts >= 3
            server.stop()  # the proxy waits for its connections


def test_chain_of_servers(start: Start, client: Client, closure: Closure, tmp_path: Path) -> None:
    third = start(store=closure.server.directory, settings=f"sign_key_paths = ['{closure.key.secret_file}']")
    second = serve(start, tmp_path, third.url, closure.key.public.strip())
    first = serve(start, tmp_path, second.url, closure.key.public.strip())
    fetch(client, first.url, closure.key.public, closure.top)
    assert client.run("nix", "log", "--store", first.url, closure.top).text


def test_unsigned_path_of_the_upstream_is_refused(
    start: Start, make_client: Callable[[str], Client], closure: Closure, tmp_path: Path
) -> None:
    other, victim = make_client("other").generate_key("closure-1"), make_client("victim")
    third = start(store=closure.server.directory, settings=f"sign_key_paths = ['{other.secret_file}']")
    first = serve(start, tmp_path, third.url, closure.key.public.strip())
    victim.settings |= {"substituters": first.url, "trusted-public-keys": other.public}
    assert victim.run("nix-store", "--realise", closure.top, check=False).returncode != 0
    first.wait_for_log("no signature by any of public_keys")


def test_swapped_nar_is_neither_accepted_nor_cached(
    start: Start, client: Client, closure: Closure, tmp_path: Path
) -> None:
    """The upstream swaps a file together with its FileHash, which is not signed."""
    push(closure, closure.top, "zstd", tmp_path / "static")
    name = closure.top.removeprefix("/nix/store/")
    narinfo = tmp_path / "static" / f"{name[:32]}.narinfo"
    fields = dict(line.split(": ", 1) for line in narinfo.read_text().splitlines())
    evil = zstandard.ZstdCompressor().compress(bytes(int(fields["NarSize"])))
    (tmp_path / "static" / fields["URL"]).write_bytes(evil)
    fields |= {"FileHash": f"sha256:{base32.encode(hashlib.sha256(evil).digest())}", "FileSize": str(len(evil))}
    narinfo.write_text("".join(f"{key}: {value}\n" for key, value in fields.items()))
    with nginx(tmp_path / "nginx", f"root {tmp_path}/static;") as (url, _):
        server = serve(start, tmp_path, url, closure.key.public.strip())
        client.settings |= {"substituters": server.url, "trusted-public-keys": closure.key.public}
        assert client.run("nix-store", "--realise", closure.top, check=False).returncode != 0
        server.wait_for_log("the unpacked NAR has another NarHash")
    assert not (client.store_dir / name).exists()
    nar_hash = fields["NarHash"].removeprefix("sha256:")
    wait_until(lambda: not [file for file in (server.cache_dir / "nar").iterdir() if nar_hash in file.name])


@pytest.mark.parametrize("via", [False, True], ids=["direct", "via the server"])
def test_stale_file_hash_or_size_fails_no_build(
    start: Start, client: Client, closure: Closure, tmp_path: Path, *, via: bool
) -> None:
    """They are not signed: caches that name files by NarHash may compress the same NAR again."""
    push(closure, closure.top, "zstd", tmp_path / "static")
    for number, narinfo in enumerate((tmp_path / "static").glob("*.narinfo")):
        fields = dict(line.split(": ", 1) for line in narinfo.read_text().splitlines())
        file = tmp_path / "static" / fields["URL"]
        content = zstandard.ZstdDecompressor().decompressobj().decompress(file.read_bytes())
        file.write_bytes(zstandard.ZstdCompressor(1, write_content_size=False).compress(content))
        fields["FileSize"] = ("0", "1", fields["FileSize"], "123456789")[number % 4]
        fields["FileHash"] = f"sha256:{'0' * 52}"
        narinfo.write_text("".join(f"{key}: {value}\n" for key, value in fields.items()))
    with nginx(tmp_path / "nginx", f"root {tmp_path}/static;") as (url, _):
        server = serve(start, tmp_path, url, closure.key.public.strip())
        fetch(client, server.url if via else url, closure.key.public, closure.top)

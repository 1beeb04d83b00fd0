"""Nix 2.3, the oldest client: what works, and what needs `nar_compression = "none"`.

Nix 2.3 reads NARs in the compressions none, xz, bzip2 and br, and no environment variable NIX_CONFIG.
"""

import random
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from harmonia.nix.signing import SecretKey
from harmonia.tools.store_builder import StoreBuilder
from support.closure import Closure, build_one, requisites
from support.cutting_proxy import CuttingProxy
from support.nix_client import NIXES, OLD_NIX, Client
from support.push_target import Target, push
from support.running import Server

Start = Callable[..., Server]

MEBIBYTE = 1 << 20
pytestmark = pytest.mark.newer_nix  # made by the same script


class OldClient(Client):
    """A machine with Nix 2.3, which reads its settings from a file only."""

    def command(self, *command: str | Path) -> list[str]:
        conf = self.directory / "etc/nix/nix.conf"
        conf.parent.mkdir(exist_ok=True)
        known = {name: value for name, value in self.settings.items() if name != "experimental-features"}
        conf.write_text("".join(f"{name} = {value}\n" for name, value in known.items()))
        return super().command(*command)


@pytest.fixture
def old(tmp_path: Path) -> Client:
    if OLD_NIX.missing is not None:
        pytest.skip(OLD_NIX.missing)
    client = OldClient(OLD_NIX, tmp_path / "old")
    assert client.run("nix", "--version").text.startswith("nix (Nix) 2.3.")
    return client


def serve(
    start: Start, closure: Closure, settings: str = "nar_compression = 'none'", bind: str = "127.0.0.1:0"
) -> Server:
    keys = f"sign_key_paths = ['{closure.key.secret_file}']\n"
    return start(store=closure.server.directory, settings=keys + settings, bind=bind)


def trust(client: Client, server: Server, closure: Closure) -> None:
    client.settings |= {"substituters": server.url, "trusted-public-keys": closure.key.public}


def test_closure_is_substituted_if_nars_are_not_compressed(start: Start, old: Client, closure: Closure) -> None:
    trust(old, serve(start, closure), closure)
    old.run("nix-store", "--realise", closure.top)
    assert requisites(old, closure.top) == requisites(closure.server, closure.top)
    old.run("nix-store", "--verify-path", *requisites(old, closure.top))


def test_closure_is_copied_and_listed(start: Start, old: Client, closure: Closure) -> None:
    server = serve(start, closure)
    trust(old, server, closure)
    listed = old.run("nix", "path-info", "--recursive", "--store", server.url, closure.top).lines
    assert sorted(listed) == sorted(requisites(closure.server, closure.top))
    old.run("nix", "copy", "--from", server.url, closure.top)
    tree = closure.paths["tree-1.0"]
    assert (
        old.run("nix", "ls-store", "-R", "--store", server.url, tree).stdout
        == old.run("nix", "ls-store", "-R", tree).stdout
    )


def test_zstd_fails_with_a_message_that_names_it(
    start: Start, old: Client, closure: Closure, new_port: Callable[[], int]
) -> None:
    bind = f"127.0.0.1:{new_port()}"
    server = serve(start, closure, "nar_compression = 'zstd'", bind)
    trust(old, server, closure)
    failed = old.run("nix-store", "--realise", closure.top, check=False)
    assert failed.returncode != 0
    assert "unknown compression method 'zstd'" in failed.stderr
    server.stop()
    serve(start, closure, bind=bind)
    assert old.run("nix-store", "--realise", closure.top, check=False).returncode != 0  # it keeps the narinfo
    old.run("nix-store", "--realise", closure.top, "--option", "narinfo-cache-positive-ttl", "0")


def test_unsigned_path_is_refused(start: Start, old: Client, closure: Closure) -> None:
    server = serve(start, closure)
    trust(old, server, closure)
    old.settings["trusted-public-keys"] = str(SecretKey.generate("closure-1").public_key)
    failed = old.run("nix-store", "--realise", closure.paths["file-1.0"], check=False)
    assert failed.returncode != 0
    assert "does not have a valid signature" in failed.stderr


def test_interrupted_download_resumes(start: Start, old: Client, tmp_path: Path) -> None:
    store, key = StoreBuilder(tmp_path / "store"), SecretKey.generate("old-1")
    contents = random.Random(1).randbytes(40 * MEBIBYTE)
    info = store.add(store.output_path("big"), contents, keys=[key])
    server = start(store=tmp_path / "store", settings="access_log = true\nnar_compression = 'none'")
    with CuttingProxy(urlsplit(server.url).port or 0, 16 * MEBIBYTE, 16 * MEBIBYTE) as network:
        old.settings |= {"substituters": network.url, "trusted-public-keys": str(key.public_key)}
        old.run("nix-store", "--realise", f"/nix/store/{info.path}")
        assert network.cuts == 2
    old.run("nix-store", "--verify-path", f"/nix/store/{info.path}")
    server.stop()
    assert [line.split("' ")[1].split()[0] for line in server.log if "GET /nar/" in line] == ["200", "206", "206"]


def test_log_is_shown(start: Start, old: Client, tmp_path: Path) -> None:
    builder = Client(NIXES[0], tmp_path / "builder")
    path = build_one(builder, "said-1.0", "echo said so; echo > $out")
    server = start(store=builder.directory)
    assert old.run("nix", "log", "--store", server.url, path).text == "said so"


@pytest.mark.parametrize("compression", ["none", "xz"])
def test_path_is_pushed(start: Start, old: Client, tmp_path: Path, compression: str) -> None:
    daemon = Client(NIXES[0], tmp_path / "store")
    daemon.run("nix-store", "--init")
    key = daemon.generate_key("pusher-1")
    daemon.settings |= {"trusted-users": "nobody-at-all", "trusted-public-keys": key.public}
    server = Target(daemon, key, start).serve()
    old.settings["netrc-file"] = str(tmp_path / "netrc")
    path = build_one(old, "one-1.0", "echo one > $out")
    with daemon.daemon():
        push(old, server, path, query=f"compression={compression}&secret-key={key.secret_file}")
    daemon.run("nix-store", "--verify-path", path)

"""`harmonia why` names what a real Nix remembers, and what its daemon ignores."""

import re
import textwrap
from collections.abc import Callable
from pathlib import Path

from harmonia.nix.nix_conf import NixConf
from harmonia.nix.signing import SecretKey
from harmonia.tools.store_builder import StoreBuilder
from support.nix_client import Client
from support.running import Server, run

Start = Callable[..., Server]


def test_negative_cache_of_nix_is_named(start: Start, make_client: Callable[[str], Client], tmp_path: Path) -> None:
    store = StoreBuilder(tmp_path / "store")
    key = SecretKey.generate("why-1")
    output = store.output_path("late")
    path = f"{store.store_dir}/{output}"
    server = start(store=tmp_path / "store")
    client = make_client("client")
    client.settings |= {"substituters": server.url, "trusted-public-keys": str(key.public_key)}
    assert client.run("nix-store", "--realise", path, check=False).returncode != 0
    store.add(output, b"", keys=[key])
    assert client.run("nix-store", "--realise", path, check=False).returncode != 0  # it does not ask again
    (tmp_path / "nix.conf").write_text(f"trusted-public-keys = {key.public_key}\n")
    (tmp_path / "none.toml").write_text(f"real_nix_store = '{client.store_dir}'\n")
    arguments = ("--config", str(tmp_path / "none.toml"), "why", "--nix-conf", str(tmp_path / "nix.conf"))
    memory = {"XDG_CACHE_HOME": str(client.directory / "root/.cache")}
    done = run(*arguments, "--cache", server.url, path, environment=memory)
    assert "Nix on this machine remembers that the cache does not have the path" in done.stdout
    assert "--refresh" in done.stdout
    client.run("nix-store", "--realise", path, "--option", "narinfo-cache-negative-ttl", "0")


def test_daemon_ignores_the_same_substituters(make_client: Callable[[str], Client]) -> None:
    client = make_client("client")
    listed, allowed, other = (f"http://127.0.0.1:1/{name}" for name in ("listed", "allowed", "other"))
    client.settings |= {
        "substituters": f"{listed}/", "trusted-substituters": allowed, "allowed-users": "*", "trusted-users": "alice",
    }  # fmt: skip
    system = client.environment["NIX_CONFIG"]
    own = f"substituters = {listed} {allowed} {other}"
    script = f"""
    chmod -R a+rX /nix/var/nix
    export NIX_CONFIG='{own}' HOME=/tmp NIX_REMOTE=daemon
    exec chroot --userspec=65534:65534 / nix-store --realise /nix/store/{"0" * 32}-none
    """
    with client.daemon():
        done = client.run("sh", "-c", textwrap.dedent(script), check=False)
    ignored = re.findall(r"ignoring untrusted substituter '(.*?)'", done.stderr)
    assert set(ignored) == {other}, done.stderr
    (client.directory / "nix.conf").write_text(system)
    environ = {"NIX_CONF_DIR": str(client.directory), "NIX_CONFIG": own, "NIX_REMOTE": "daemon"}
    assert NixConf(environ, by_daemon=True).ignored_substituters == [other]

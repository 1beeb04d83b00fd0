"""Nix behind a proxy with HTTP/1.0, like nginx without `proxy_http_version`."""

from collections.abc import Callable
from pathlib import Path
from random import Random

from harmonia.nix.signing import SecretKey
from harmonia.tools.store_builder import StoreBuilder
from support.cutting_proxy import CuttingProxy
from support.held_compression import held_by
from support.nginx import nginx
from support.nix_client import Client
from support.running import Server

MIB = 1 << 20


def test_cold_nar_is_substituted_before_it_is_compressed(
    start: Callable[..., Server], client: Client, tmp_path: Path
) -> None:
    """Nix rejects a transfer that breaks off, and accepts a complete one with its signature."""
    store = StoreBuilder(tmp_path / "store")
    key = SecretKey.generate("cold-1")
    info = store.add(store.output_path("big"), {"big": Random(1).randbytes(9 * MIB)}, keys=[key])
    path = f"{store.store_dir}/{info.path}"
    server = start(store=tmp_path / "store", program=held_by(tmp_path / "held"))
    with (
        CuttingProxy(int(server.url.rpartition(":")[2]), MIB, 8 * MIB) as network,
        nginx(tmp_path / "nginx", f"location / {{ proxy_pass {network.url}; }}") as (url, _),
    ):
        client.settings |= {"substituters": url, "trusted-public-keys": str(key.public_key)}
        broken = client.run("nix-store", "--realise", path, check=False)
        assert broken.returncode != 0
        assert network.cuts >= 1
        assert client.run("nix-store", "--check-validity", path, check=False).returncode != 0
        network.least = network.most = 1 << 40
        client.run("nix-store", "--realise", path)
    client.run("nix-store", "--verify-path", path)
    (tmp_path / "held").unlink()

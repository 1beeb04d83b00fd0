"""Stock Nix reads a bucket that `harmonia mirror` has filled, while no Harmonia runs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from support.closure import Closure, requisites
from support.nix_client import Client
from support.running import Server, run
from support.s3_service import Folder, S3Service

pytestmark = pytest.mark.s3


def mirror(closure: Closure, folder: Folder, directory: Path, *paths: str) -> None:
    """Write closures of paths in the closure's store to the bucket."""
    config = directory / "mirror.toml"
    server = closure.server
    config.write_text(
        f"real_nix_store = '{server.store_dir}'\nnix_db_path = '{server.db_path}'\nlog_dir = '{server.log_dir}'\n"
        f"cache_dir = '{directory}/mirror-cache'\nsign_key_paths = ['{closure.key.secret_file}']\n{folder.settings()}"
    )
    answer = run("--config", str(config), "mirror", *paths)
    assert answer.returncode == 0, answer.stderr


def test_closure_is_substituted_from_the_bucket_alone(
    client: Client, closure: Closure, folder: Folder, tmp_path: Path
) -> None:
    mirror(closure, folder, tmp_path, closure.top)
    client.settings |= {"substituters": folder.url, "trusted-public-keys": closure.key.public}
    client.run("nix-store", "--realise", closure.top)
    paths = requisites(client, closure.top)
    assert paths == requisites(closure.server, closure.top)
    client.run("nix-store", "--verify-path", *paths)
    client.run("nix", "store", "verify", "--recursive", "--store", folder.url, closure.top)
    assert client.run("nix", "store", "ls", "--store", folder.url, closure.top).lines
    assert client.run("nix", "log", "--store", folder.url, closure.top).text


def test_closure_is_copied_from_the_bucket(
    make_client: Callable[[str], Client], closure: Closure, folder: Folder, tmp_path: Path
) -> None:
    client = make_client("copier")
    alike = client.nix.version < (2, 9)  # later versions hash self-references differently, and refuse floating-1.0
    paths = [path for name, path in closure.paths.items() if alike or name != "floating-1.0"]
    mirror(closure, folder, tmp_path, *paths)
    client.settings["trusted-public-keys"] = closure.key.public
    client.run("nix", "copy", "--from", folder.url, *paths)
    client.run("nix-store", "--verify-path", *requisites(client, closure.top))


@pytest.mark.parametrize("more", ["", "redirect = true"], ids=["proxied", "redirected"])
def test_closure_is_substituted_through_a_gate_without_a_store(
    client: Client, closure: Closure, s3_service: S3Service, tmp_path: Path, *, more: str
) -> None:
    folder = s3_service.folder(tmp_path, "private")
    mirror(closure, folder, tmp_path, closure.top)
    gate = Server(tmp_path / "gate", tmp_path / "nothing")
    mirrored = folder.settings(f"public_keys = ['{closure.key.public.strip()}']\n{more}", who="reader")
    gate.config.write_text(
        f"bind = '127.0.0.1:0'\nlocal_store = false\ncache_dir = '{tmp_path}/gate-cache'\nworkers = 2\n{mirrored}"
    )
    gate.start()
    try:
        client.settings |= {"substituters": gate.url, "trusted-public-keys": closure.key.public}
        client.run("nix-store", "--realise", closure.top)
        client.run("nix-store", "--verify-path", *requisites(client, closure.top))
        assert client.run("nix", "log", "--store", gate.url, closure.top).text
    finally:
        gate.stop()

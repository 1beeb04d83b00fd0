"""`nix-store --realise --dry-run` shows the size of a download once `harmonia warm` has compressed the NAR."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from harmonia.nix.signing import SecretKey
from harmonia.tools.store_builder import StoreBuilder
from support.nix_client import Client
from support.running import Server, run, wait_until

Start = Callable[..., Server]

_DOWNLOAD = re.compile(r"\(([\d.]+) [KM]iB download, ")


def test_dry_run_shows_the_download_size_after_warm(
    start: Start, make_client: Callable[[str], Client], tmp_path: Path
) -> None:
    store = StoreBuilder(tmp_path / "store")
    key = SecretKey.generate("dry-run-1")
    info = store.add(store.output_path("large"), os.urandom(3 << 20), keys=[key])
    path = f"{store.store_dir}/{info.path}"
    server = start(store=tmp_path / "store")

    def shown(name: str) -> str:
        """Return the size that a fresh client shows."""
        client = make_client(name)
        client.settings |= {"substituters": server.url, "trusted-public-keys": str(key.public_key)}
        stderr = client.run("nix-store", "--realise", "--dry-run", path).stderr
        match = _DOWNLOAD.search(stderr)
        assert match, stderr
        return match[1]

    assert shown("before") in {"0.00", "0.0"}
    assert run("--config", str(server.config), "warm", path).returncode == 0
    wait_until(lambda: b"FileSize: " in server.get(f"/{info.path.hash_part}.narinfo").body)
    assert shown("after") in {"3.00", "3.0"}

"""A store that is backed up and restored as documented in docs/how-to has all its paths and signatures."""

import os
import subprocess
from pathlib import Path

import pytest

from harmonia.store.store import Store
from harmonia.tools import demo
from support.pages import BLOCKS
from support.programs import needs

pytestmark = [
    pytest.mark.nix,
    needs("nix-store"),
]


def run_documented_command(place: str, cache: Path, store: str, home: Path) -> None:
    """Run the documented command for `file://{place}`, with `cache` instead of `place`, on the given store."""
    [text] = [
        block.text for block in BLOCKS if block.page.startswith("docs/how-to/") and f"file://{place}" in block.text
    ]
    command = text.removeprefix("# ").replace(place, str(cache))
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "NIX_REMOTE": f"local?root={store}",
        "NIX_CONFIG": "substituters =\nbuild-users-group =\n",
    }
    done = subprocess.run(command, shell=True, cwd=home, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_backup_is_restored_with_all_paths_and_signatures(tmp_path: Path) -> None:
    made = demo.make(str(tmp_path / "demo"))
    (tmp_path / "cache.public").write_text(str(made.public_key))
    cache = tmp_path / "cache"
    run_documented_command("/backup", cache, made.directory, tmp_path)
    assert len(list(cache.glob("*.narinfo"))) == len(made.paths)

    run_documented_command("/srv/cache", cache, f"{tmp_path}/new", tmp_path)
    old, new = (
        Store("/nix/store", f"{root}/nix/store", f"{root}/nix/var/nix/db/db.sqlite")
        for root in (made.directory, f"{tmp_path}/new")
    )
    for path in made.paths.values():
        if not path.name.endswith(".drv"):  # Nix 2.8 would take it for an output
            assert new.path_info(path.hash_part) == old.path_info(path.hash_part)
    old.database.close()
    new.database.close()

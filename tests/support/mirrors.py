"""Mirrors of small stores, written by `harmonia mirror`."""

import random
from pathlib import Path

from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey
from harmonia.tools.store_builder import StoreBuilder
from support.running import run

KEY = SecretKey.generate("mirror-1")


def configure(store: StoreBuilder, directory: Path, mirror: str, cache: str = "cache", more: str = "") -> str:
    key = directory / "key"
    key.write_text(KEY.export())
    key.chmod(0o600)
    file = directory / f"{cache}.toml"
    file.write_text(
        f"real_nix_store = '{store.real_dir}'\nnix_db_path = '{store.db_path}'\ncache_dir = '{directory}/{cache}'\n"
        f"sign_key_paths = ['{key}']\n{more}\n{mirror}\n"
    )
    return str(file)


def mirror(config: str, *paths: str) -> str:
    """Write paths to the bucket, and return the summary."""
    answer = run("--config", config, "mirror", *paths)
    assert answer.returncode == 0, answer.stderr
    return answer.stderr


def chain(store: StoreBuilder, count: int, size: int = 2000) -> list[PathInfo]:
    """Add paths of which each refers to the one before it."""
    content = random.Random(count)
    infos: list[PathInfo] = []
    for number in range(count):
        references = [infos[-1].path] if infos else []
        infos.append(store.add(store.output_path(f"p{number}"), content.randbytes(size), references=references))
    return infos

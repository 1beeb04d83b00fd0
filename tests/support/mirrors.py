"""Mirrors of small stores, written by `harmonia mirror`."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey
from harmonia.tools.store_builder import StoreBuilder
from support.running import Server, run
from support.s3_service import Folder

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


@contextmanager
def gates(folder: Folder, public_key: object, directory: Path, count: int, more: str = "") -> Iterator[list[Server]]:
    """Run servers without a store in front of the bucket, each with a cache of its own."""
    mirrored = folder.settings(f"public_keys = ['{public_key}']\n{more}", who="reader")
    servers = [Server(directory / f"gate-{number}", directory / "nothing") for number in range(count)]
    with ExitStack() as stack:
        for server in servers:
            server.config.write_text(
                f"bind = '127.0.0.1:0'\nlocal_store = false\ncache_dir = '{server.cache_dir}'\nworkers = 1\n"
                f"upstream_timeout = 60.0\n{mirrored}"
            )
            server.start()
            stack.callback(server.stop)
        yield servers


def chain(store: StoreBuilder, count: int, size: int = 2000) -> list[PathInfo]:
    """Add paths of which each refers to the one before it."""
    content = random.Random(count)
    infos: list[PathInfo] = []
    for number in range(count):
        references = [infos[-1].path] if infos else []
        infos.append(store.add(store.output_path(f"p{number}"), content.randbytes(size), references=references))
    return infos

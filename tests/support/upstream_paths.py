"""Paths that only an upstream has, and settings that name the upstream."""

import bz2
import gzip
import hashlib
import lzma
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import brotli
import zstandard

from harmonia.nix import nar as nix_nar
from harmonia.nix.narinfo import NarFile
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey
from harmonia.store import file_reader, tree_reader
from harmonia.tools.store_builder import StoreBuilder
from support.packing import lzip
from support.running import Answer, Server
from support.upstream_server import UpstreamServer, file_url

KEY = SecretKey.generate("upstream-1")
PACK: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "none": ("", bytes),
    "xz": (".xz", partial(lzma.compress, preset=0)),  # a tenth of the processor time of the default
    "bzip2": (".bz2", bz2.compress),
    "gzip": (".gz", gzip.compress),
    "zstd": (".zst", zstandard.ZstdCompressor(3).compress),
    "br": (".br", partial(brotli.compress, quality=1)),
    "lzip": (".lzip", lzip),
}


@dataclass
class Remote:
    """A path that only the upstream has."""

    info: PathInfo
    file: bytes
    nar: NarFile
    content: bytes


_numbers = count()


def make_path(directory: Path, size: int = 1 << 16, compression: str = "xz") -> Remote:
    """Make a new path each time, because the server caches responses of upstreams."""
    store = StoreBuilder(directory)
    name = f"there-{next(_numbers)}"
    half = random.Random(name).randbytes(size // 2)
    info = store.add(store.output_path(name), {"one": half, "zeros": bytes(size // 2)})
    root = f"{store.real_dir}/{info.path}".encode()
    content = b"".join(file_reader.read(nix_nar.segments(nix_nar.serialize(tree_reader.walk(root)))))
    extension, pack = PACK[compression]
    file = pack(content)
    file_hash = hashlib.sha256(file).digest()
    return Remote(info, file, NarFile(file_url(file_hash, extension), compression, file_hash, len(file)), content)


def entry(upstream: "UpstreamServer | Server", *, verify: bool = True, **more: object) -> str:
    lines = [f"{key} = {value!r}".replace("True", "true") for key, value in more.items()]
    keys = [f"public_keys = ['{KEY.public_key}']"] if verify else []
    return "\n".join(["[[upstream]]", f"url = '{upstream.url}'", *keys, *lines, ""])


def fields(answer: Answer) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in answer.text.splitlines())


def narinfo_path(path: Remote) -> str:
    return f"/{path.info.path.hash_part}.narinfo"

"""Build logs at the places of Nix."""

import bz2
import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import zstandard

from harmonia.tools.store_builder import StoreBuilder

TEXT = b"".join(b"compiling file %d of \xc3\xa4 build\n" % number for number in range(40_000))
"""A text longer than a chunk, and than a block of bzip2."""


DAY = 24 * 60 * 60


def age(path: str, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def plain(text: bytes) -> bytes:
    return text


def zst(text: bytes) -> bytes:
    """Compress into two frames, of which the first does not have its length."""
    compressor = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    rest = zstandard.ZstdCompressor(write_checksum=True).compress(text[1000:])
    return compressor.compress(text[:1000]) + compressor.flush() + rest


FORMS: dict[str, Callable[[bytes], bytes]] = {"": plain, ".bz2": bz2.compress, ".zst": zst}


@cache
def _stored(suffix: str) -> bytes:
    return FORMS[suffix](TEXT)


def add_log(
    store: StoreBuilder, derivation: str, text: bytes = TEXT, suffix: str = ".bz2", *, flat: bool = False
) -> str:
    """Write a log where Nix writes it, with an age that marks it as finished."""
    name = derivation if flat else f"{derivation[:2]}/{derivation[2:]}"
    path = f"{store.log_dir}/{name}{suffix}"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Path(path).write_bytes(_stored(suffix) if text is TEXT else FORMS[suffix](text))
    age(path, 2 * DAY)
    return path


def collected(store: StoreBuilder, name: str) -> str:
    """Return the name of a derivation of which only the log is left."""
    return str(store.output_path(name)) + ".drv"

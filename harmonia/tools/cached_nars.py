"""NARs in the cache on disk, with the store paths that they belong to, for people who look after it.

Reading and removing is safe while servers use the cache: a file is removed as an eviction removes it, and its readers
can continue.
"""

import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from typing import NamedTuple, Self

from harmonia.cache.compressed_files import CompressedFile
from harmonia.cache.disk_cache import DiskCache
from harmonia.cache.growing_file import GROWING
from harmonia.config.settings import Settings
from harmonia.errors import ConfigError, FormatError
from harmonia.nix import base32, narinfo
from harmonia.nix.store_path import StorePath
from harmonia.store import queries
from harmonia.store.store import Store
from harmonia.upstream.narinfo_cache import read_narinfos

_NAR_HASH = f"[{base32.ALPHABET}]{{52}}"
_KEY = re.compile(rf"({_NAR_HASH})(?:\.(zstd-.+)|-.+\.nar\.(.+))")
"""Keys of our own compressed NARs (compressed_files.py), and of those of upstreams (nar_name.py)."""


class CachedNar(NamedTuple):
    """A complete file of the cache."""

    key: str
    """The name of the file."""
    size: int
    """Disk space in bytes."""
    used_at: float
    """Time of the last use, or of the end of the fill, in seconds since 1970. Up to a minute late."""
    uses: int | None
    """Number of minutes in which it was used, without the first one, or None if the file system cannot keep it."""
    nar_hash: str
    """In base 32, or empty if the name of the file has none."""
    encoding: str
    """The zstd encoding of our own file, or the compression of an upstream's file."""
    is_upstream: bool
    """True if the file is as an upstream sent it."""
    paths: tuple[StorePath, ...]
    """The store paths with this NAR: valid ones, and those of upstreams. Empty if none is known any more."""

    def has_name(self, name: str) -> bool:
        """Return True if `name` is the file's name, or the hash part of a path with this NAR."""
        return name in (self.key, *(path.hash_part for path in self.paths))


class CachedNars:
    """The cache of the settings' `cache_dir`. For one thread."""

    def __init__(self, cache: DiskCache, narinfos: DiskCache | None, store: Store) -> None:
        self.cache = cache
        self._narinfos = narinfos
        self._store = store

    @classmethod
    def of(cls, settings: Settings, store: Store) -> Self | None:
        """Return the cache, or None if no server has created it. Raises ConfigError if it cannot be written."""

        def opened(name: str, *, bare: bool = False) -> DiskCache | None:
            directory = os.path.join(str(settings.cache_dir), name)
            if not os.path.lexists(directory):  # to create it as another user would lock the server out
                return None
            try:
                return DiskCache(directory, settings.cache_bytes, bare=bare)
            except OSError as error:
                what = f"cache_dir: cannot write {directory!r}: {error.strerror}"
                raise ConfigError(f"{what}; run this as root or as the user of the server") from None

        nars = opened("nar", bare=settings.nginx_location is not None)
        return None if nars is None else cls(nars, opened("narinfo"), store)

    def find_all(self) -> list[CachedNar]:
        """Return all complete files, the next one to be evicted first.

        Raises OSError if the directory cannot be read, StoreUnavailableError if the database cannot.
        """
        paths = self._paths()
        found = []
        for entry in sorted(self.cache.entries()):
            key = os.path.basename(entry.path)
            match = _KEY.fullmatch(key)
            nar_hash, own, compression = match.groups() if match else ("", None, None)
            nar = CachedNar(
                key=key,
                size=entry.size,
                used_at=entry.used_at,
                uses=self.cache.uses(key),
                nar_hash=nar_hash,
                encoding=own or compression or "",
                is_upstream=compression is not None,
                paths=tuple(sorted(paths.get(nar_hash, ()))),
            )
            found.append(nar)
        return found

    def growing(self) -> int:
        """Return the number of files that are being filled, or whose fillers died."""
        return sum(entry.path.endswith(GROWING) for entry in self.cache.entries(growing=True))

    def file_info(self, nar: CachedNar) -> CompressedFile | None:
        """Return hash and size of the content of a file, or None if it was evicted meanwhile."""
        file = self.cache.find_file(nar.key)
        if file is None:
            return None
        with closing(file):
            return CompressedFile(file.sha256, file.size) if file.sha256 is not None else None

    def remove(self, nar: CachedNar, *, unused_since: float | None = None) -> bool:
        """Remove a file unless it was used after `unused_since`. Return True if it was removed."""
        return self.cache.remove(nar.key, unused_since=unused_since)

    def _paths(self) -> Mapping[str, Collection[StorePath]]:
        """Return the known store paths by their NAR hash in base 32."""
        paths: dict[str, set[StorePath]] = defaultdict(set)
        for path, nar_hash in queries.nar_hashes(self._store):
            paths[base32.encode(nar_hash)].add(path)
        for path, nar_hash in self._upstream_paths():
            paths[base32.encode(nar_hash)].add(path)
        return paths

    def _upstream_paths(self) -> Iterator[tuple[StorePath, bytes]]:
        """Yield the paths of upstreams whose narinfos are in the cache, and their NAR hashes."""
        for text in () if self._narinfos is None else read_narinfos(self._narinfos):
            try:
                info, _ = narinfo.parse(text.decode(errors="surrogateescape"), self._store.store_dir)
            except FormatError:  # of an upstream that was replaced by one with another store directory
                continue
            yield info.path, info.nar_hash

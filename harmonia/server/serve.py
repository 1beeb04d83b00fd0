"""`/serve/<hash>/<path>`: what is in a store path, for browsers.

Nothing is looked up by a path of more than one name. Each name is opened in the directory opened before, and never a
symlink with it (openat(2), O_NOFOLLOW): whatever is changed meanwhile, no name leads anywhere else. Symlinks are read,
and followed by the rules of this module: within the store path, or to another one that is valid.

This is no more than `/nar` gives to those who know the hash part, and so it is always on.
"""

import errno
import hashlib
import heapq
import mimetypes
import os
import stat
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import NamedTuple
from urllib.parse import quote, unquote_to_bytes

from html5tagger import Builder
from sanic import Request
from sanic.exceptions import NotFound

from harmonia.errors import FormatError, StoreObjectError
from harmonia.nix import base32
from harmonia.nix.nar import CHUNK_SIZE
from harmonia.nix.path_info import PathInfo
from harmonia.nix.store_path import StorePath, is_hash_part
from harmonia.server import page
from harmonia.server.body import IMMUTABLE, Representation
from harmonia.server.cache import Cache
from harmonia.server.nar import found
from harmonia.store import Store

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_LINKS = 40  # symlinks on the way, as in Linux (path_resolution(7))
_PATH_MAX = 4096  # bytes, likewise
_SAMPLE = 64 * 1024  # bytes that tell whether a file is text
_LISTED = 2000  # entries of a directory on its page; the NAR listing has them all

# Those of the standard library differ with its version, and with /etc/mime.types. These make web sites work, or are
# shown instead of saved.
_TYPES = mimetypes.MimeTypes(())
for _type, _extensions in {
    "text/html": ".html .htm",
    "text/css": ".css",
    "text/javascript": ".js .mjs",
    "application/json": ".json .map",
    "application/manifest+json": ".webmanifest",
    "application/wasm": ".wasm",
    "application/xhtml+xml": ".xhtml",
    "application/xml": ".xml .xsl .xsd",
    "application/octet-stream": ".a .o .so",
    "application/zstd": ".zst",
    "font/otf": ".otf",
    "font/ttf": ".ttf",
    "font/woff": ".woff",
    "font/woff2": ".woff2",
    "image/avif": ".avif",
    "image/svg+xml": ".svg",
    "image/webp": ".webp",
    "image/x-icon": ".ico",
    "text/plain": ".bash .c .cfg .conf .drv .h .ini .log .md .nix .patch .pl .py .rs .sh .toml .ts .yaml .yml",
}.items():
    for _extension in _extensions.split():
        _TYPES.add_type(_type, _extension)
_ENCODINGS = {"gzip": "application/gzip", "bzip2": "application/x-bzip2", "xz": "application/x-xz"}
_PDF = "application/pdf"
_COMPRESSED = ("image/", "audio/", "video/", "font/", "application/zip", "application/zstd", _PDF)

# A page from the store may hold anybody's script, and must not act as this cache: read with the rights of who looks at
# it, be it by a cookie of the proxy in front or by the network that it is in. In a sandbox its origin is no other's
# (HTML section 7.1.1, "opaque origin"), so that it can read nothing of us but what CORS opens to all, and that is this
# resource: its own modules, fonts and data. It has no cookies and no local storage. All types but one get the header:
# which of them can run a script is for browsers to know.
_SANDBOX = "sandbox allow-downloads allow-forms allow-modals allow-popups allow-scripts"


class _SymlinkError(StoreObjectError):
    """A symlink where the walk to a file has come to, `depth` names below the store path."""

    def __init__(self, depth: int, target: bytes) -> None:
        super().__init__("there is a symlink in its place now")
        self.depth = depth
        self.target = target


@contextmanager
def _opened(top: bytes, names: Sequence[bytes]) -> Iterator[int]:
    """What has these names in the store object at `top`, each in the one before."""
    descriptor = None
    try:
        for depth, name in enumerate((top, *names)):
            try:
                inner = os.open(name, _FLAGS, dir_fd=descriptor)
            except OSError as error:
                if error.errno == errno.ELOOP:
                    raise _SymlinkError(depth, os.readlink(name, dir_fd=descriptor)) from None
                raise
            if descriptor is not None:
                os.close(descriptor)
            descriptor = inner
        assert descriptor is not None  # noqa: S101 (`top` was opened)
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


class _Entry(NamedTuple):
    """What is at `names` below the store path `info`, which no symlink is part of."""

    info: PathInfo
    names: list[bytes]
    status: os.stat_result
    sample: bytes
    """The beginning of a file."""


@dataclass(frozen=True, slots=True)
class _File:
    """The contents of a file that was looked at before."""

    top: bytes
    names: Sequence[bytes]
    status: os.stat_result
    sha256: None = None

    @property
    def size(self) -> int:
        return self.status.st_size

    def read(self, start: int, stop: int | None) -> Generator[bytes]:
        stop = self.size if stop is None else stop
        with _opened(self.top, self.names) as descriptor:
            if not os.path.samestat(os.fstat(descriptor), self.status):
                raise StoreObjectError(f"{os.fsdecode(self.top)} was changed while it was served")
            while start < stop and (data := os.pread(descriptor, min(CHUNK_SIZE, stop - start), start)):
                start += len(data)
                yield data


async def get(cache: Cache, request: Request, where: str) -> Representation:  # noqa: ARG001 (not as it was sent)
    _, _, hash_part, *encoded = request.path.split("/")
    names = [unquote_to_bytes(name) for name in encoded]
    as_directory = names[-1:] == [b""]
    names = names[:-1] if as_directory else names
    if not is_hash_part(hash_part) or any(name in (b"", b".", b"..") or set(name) & set(b"/\0") for name in names):
        raise NotFound
    info = found(await cache.path(hash_part))
    entry = await _resolve(cache, info, names)
    if not stat.S_ISDIR(entry.status.st_mode):
        if as_directory:
            raise NotFound
        return _file(cache, entry)
    if not as_directory:
        return page.redirect(
            f"./{quote(names[-1] if names else hash_part, safe='')}/", HTTPStatus.MOVED_PERMANENTLY, IMMUTABLE
        )
    try:
        index = await _resolve(cache, entry.info, [*entry.names, b"index.html"])
    except NotFound:
        index = entry
    if stat.S_ISREG(index.status.st_mode):
        return _file(cache, index)
    return await _directory(cache, info, names, entry)


async def _resolve(cache: Cache, info: PathInfo, names: Sequence[bytes]) -> _Entry:
    """What is at `names` in that store path, by way of symlinks. NotFound also where these lead elsewhere."""
    parts = [os.fsencode(info.path), *names]
    for _ in range(_LINKS + 1):
        if sum(map(len, parts)) + len(parts) > _PATH_MAX:
            break
        if parts[0] != os.fsencode(info.path):
            info = await _named(cache, parts[0])
        step = await cache.read(partial(_step, cache.store, info, parts[1:]))
        if isinstance(step, _Entry):
            return step
        parts = step
        if not parts:  # it leads to the store itself
            break
    raise NotFound


async def _named(cache: Cache, base_name: bytes) -> PathInfo:
    try:
        path = StorePath(os.fsdecode(base_name))
    except FormatError:
        raise NotFound from None
    info = found(await cache.path(path.hash_part))
    if info.path != path:
        raise NotFound
    return info


def _step(store: Store, info: PathInfo, names: list[bytes]) -> _Entry | list[bytes]:
    """The entry at `names`; or where the first symlink or `..` leads, as names in the store directory."""
    top = store.real_path(info.path)
    parts = [os.fsencode(info.path), *names]
    up = parts.index(b"..") if b".." in parts else len(parts)
    try:
        with _opened(top, parts[1:up]) as descriptor:
            status = os.fstat(descriptor)
            if up < len(parts) and stat.S_ISDIR(status.st_mode):
                return parts[: up - 1] + parts[up + 1 :]
            if up == len(parts) and stat.S_ISREG(status.st_mode):
                return _Entry(info, names, status, os.pread(descriptor, _SAMPLE, 0))
            if up == len(parts) and stat.S_ISDIR(status.st_mode):
                return _Entry(info, names, status, b"")
    except _SymlinkError as link:
        target = [name for name in link.target.split(b"/") if name not in (b"", b".")]
        rest = parts[link.depth + 1 :]
        if not link.target.startswith(b"/"):
            return parts[: link.depth] + target + rest
        store_dir = os.fsencode(store.store_dir).strip(b"/").split(b"/")
        if target[: len(store_dir)] == store_dir:
            return target[len(store_dir) :] + rest
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG) or error.filename == top:
            raise
    raise NotFound


def _file(cache: Cache, entry: _Entry) -> Representation:
    body = _File(cache.store.real_path(entry.info.path), entry.names, entry.status)
    inner = b"/".join(entry.names)
    content_type = _content_type(entry.names[-1] if entry.names else os.fsencode(entry.info.path), entry.sample)
    headers = {"x-content-type-options": "nosniff", "access-control-allow-origin": "*"}
    if content_type != _PDF:  # Chromium shows none in a sandbox
        headers["content-security-policy"] = _SANDBOX
    compressible = content_type == "image/svg+xml" or not content_type.startswith((*_COMPRESSED, *_ENCODINGS.values()))
    return Representation(
        content_type=content_type,
        body=body,
        cache_control=IMMUTABLE,
        etag=f'"{base32.encode(entry.info.nar_hash)}-{hashlib.sha256(inner).hexdigest()[:32]}"',
        zstd=cache.encoded(body),
        worthwhile=compressible and not (cache.compressor and cache.compressor.saturated),
        headers=headers,
    )


def _content_type(name: bytes, sample: bytes) -> str:
    """By the name, where that tells. What is UTF-8 otherwise is text; the last character of a sample may be cut."""
    try:
        utf8 = b"\0" not in sample and len(sample.decode(errors="strict")) >= 0
    except UnicodeDecodeError as error:
        utf8 = len(sample) == _SAMPLE and error.reason == "unexpected end of data"
    guessed, encoding = _TYPES.guess_type("./" + os.fsdecode(name).lower())
    if encoding:
        return _ENCODINGS.get(encoding, "application/octet-stream")
    guessed = guessed or ("text/plain" if utf8 else "application/octet-stream")
    if guessed.startswith("text/x-"):  # source code and the like, which some browsers would save
        guessed = "text/plain"
    return f"{guessed}; charset=utf-8" if guessed.startswith("text/") and utf8 else guessed


class _Listed(NamedTuple):
    name: bytes
    mode: int
    size: int
    target: bytes


def _list(top: bytes, names: Sequence[bytes]) -> tuple[list[_Listed], int]:
    """The first entries of a directory in the order of their bytes, and how many there are."""
    count = 0

    def counted() -> Iterator[bytes]:
        nonlocal count
        with os.scandir(descriptor) as entries:
            for entry in entries:
                count += 1
                yield os.fsencode(entry.name)

    def look(name: bytes) -> _Listed:
        status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
        target = os.readlink(name, dir_fd=descriptor) if stat.S_ISLNK(status.st_mode) else b""
        return _Listed(name, status.st_mode, status.st_size, target)

    with _opened(top, names) as descriptor:
        first = heapq.nsmallest(_LISTED, counted())
        return [look(name) for name in first], count


async def _directory(cache: Cache, asked: PathInfo, names: Sequence[bytes], entry: _Entry) -> Representation:
    """The page of the directory `entry`, which was asked for by `names` in the store path `asked`."""

    def render() -> Representation:
        entries, count = _list(cache.store.real_path(entry.info.path), entry.names)
        document = page.begin(cache, page.printable(names[-1]) if names else asked.path.name, "../" * (len(names) + 2))
        with document.main:
            _heading(cache, document, asked, names)
            with document.section:
                summary = page.count(count, "entry", "entries")
                if count > len(entries):
                    summary = f"The first {len(entries):,} of {summary}; the NAR listing has them all"
                document.p(summary, class_="dim")
                with document.table:
                    document.tr.th("Name", scope="col").th("Kind", scope="col").th("Size", scope="col", class_="size")
                    if names:
                        document.tr.td.a("..", href="../", aria_label="Parent directory").td("directory").td("")
                    for listed in entries:
                        _row(document, listed)
        return page.end(cache, document)

    return await cache.read(render)


def _heading(cache: Cache, document: Builder, asked: PathInfo, names: Sequence[bytes]) -> None:
    """Where the page is, each directory above it a link."""
    with document.h1(class_="path"):
        if cache.settings.browse:
            document.a(cache.store.store_dir, href=f"{'../' * (len(names) + 2)}path/{asked.path.hash_part}")
        else:
            document(cache.store.store_dir)
        for above, name in zip(range(len(names), -1, -1), [os.fsencode(asked.path), *names], strict=True):
            document._("/")
            if above:
                document.a(page.printable(name), href="../" * above)
            else:
                document._(page.printable(name))


def _row(document: Builder, listed: _Listed) -> None:
    reference = "./" + quote(listed.name, safe="")
    size = ""
    if stat.S_ISDIR(listed.mode):
        kind, reference = "directory", reference + "/"
    elif stat.S_ISLNK(listed.mode):
        kind = "symlink"
    else:
        kind, size = "executable" if listed.mode & stat.S_IXUSR else "file", page.size(listed.size)
    document.tr.td(class_="path").a(page.printable(listed.name), href=reference)
    if listed.target:
        document.span(f" → {page.printable(listed.target)}", class_="dim")
    document.td(kind, class_="kind").td(size, class_="size", title=f"{listed.size:,} bytes" if size else None)

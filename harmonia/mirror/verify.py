"""Check of the bucket: each narinfo has its whole NAR, with the right hashes, and all its references.

Other objects must be well-formed, and what they name must be in the bucket.
"""

import asyncio
import hashlib
import json
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from harmonia.errors import FormatError
from harmonia.mirror import layout
from harmonia.nix import cache_info, narinfo
from harmonia.nix.nar_check import NarCheck
from harmonia.nix.narinfo import NarFile
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import PublicKey
from harmonia.nix.store_path import StorePath

if TYPE_CHECKING:
    from harmonia.mirror.bucket import Bucket, Object

_T = TypeVar("_T")

MAX_READS = 16
"""Objects that are read at once."""
_MAX_LISTING_BYTES = 4 << 20
"""Length up to which listings are parsed, each in ten times the memory."""


class Finding(NamedTuple):
    key: str
    """The key of the wrong object."""
    what: str


class Contents(NamedTuple):
    """The objects of the bucket."""

    objects: dict[str, "Object"]
    """All objects, by their keys."""
    paths: dict[str, tuple[PathInfo, NarFile]]
    """The parsed narinfos, by hash part."""
    wrong: list[Finding]
    """The objects that cannot be parsed."""


async def read_contents(bucket: "Bucket", store_dir: str) -> Contents:
    """Return all keys and all narinfos. Holds some 2 KiB of memory for each path. Raises TargetError."""
    objects = {each.key: each async for page in bucket.list() for each in page}
    contents = Contents(objects, {}, [])
    hash_parts = [key.removesuffix(".narinfo") for key in objects if key.endswith(".narinfo") and "/" not in key]

    async def read(hash_part: str) -> None:
        key = f"{hash_part}.narinfo"
        text = await bucket.get(key)
        if text is None:
            return  # deleted meanwhile
        try:
            info, nar = narinfo.parse(text.decode(errors="surrogateescape"), store_dir)
            if info.path.hash_part != hash_part:
                raise FormatError(f"it is the narinfo of {info.path}")
            contents.paths[hash_part] = info, nar
        except FormatError as error:
            contents.wrong.append(Finding(key, str(error)))

    await for_each(read, hash_parts)
    return contents


async def verify(
    bucket: "Bucket", contents: Contents, store_dir: str, keys: Collection[PublicKey], *, content: bool
) -> AsyncIterator[Finding]:
    """Yield what is wrong. With `content`, read and hash each NAR. With `keys`, each path needs a signature by one."""
    for finding in contents.wrong:
        yield finding
    for info, nar in contents.paths.values():
        for what in _mistakes(contents, info, nar):
            yield Finding(layout.narinfo_key(info.path), what)
        fingerprint = info.fingerprint(store_dir)
        if keys and info.ca is None and not any(key.verify(fingerprint, sig) for key in keys for sig in info.sigs):
            yield Finding(layout.narinfo_key(info.path), "no signature by any of the public keys")
    if (mistake := _cache_info_mistake(await bucket.get(layout.CACHE_INFO), store_dir)) is not None:
        yield Finding(layout.CACHE_INFO, mistake)
    for finding in await _wrong_others(bucket, contents, listings=content):
        yield finding
    for finding in await _wrong_nars(bucket, contents) if content else ():
        yield finding


def _mistakes(contents: Contents, info: PathInfo, nar: NarFile) -> Sequence[str]:
    """Return what the listing shows to be wrong with a path."""
    mistakes = [f"its reference {each} is missing" for each in info.references if each.hash_part not in contents.paths]
    file = contents.objects.get(nar.url)
    if file is None:
        mistakes.append(f"its NAR {nar.url} is missing")
    elif nar.file_size not in (None, file.size):
        mistakes.append(f"its NAR {nar.url} has {file.size} bytes, not {nar.file_size}")
    return mistakes


async def _wrong_nars(bucket: "Bucket", contents: Contents) -> list[Finding]:
    """Read all NARs. Return those that do not have their hashes."""
    found: list[Finding] = []

    async def check(path: tuple[PathInfo, NarFile]) -> None:
        info, nar = path
        try:
            await _check_content(bucket, info, nar)
        except FormatError as error:
            found.append(Finding(nar.url, f"{error}, by the narinfo of {info.path}"))

    present = [(info, nar) for info, nar in contents.paths.values() if nar.url in contents.objects]
    # Paths with the same content share a NAR, which is read once unless their narinfos describe it differently.
    described = {(nar, info.nar_hash, info.nar_size): (info, nar) for info, nar in present}
    await for_each(check, described.values())
    return found


async def _check_content(bucket: "Bucket", info: PathInfo, nar: NarFile) -> None:
    """Raise FormatError if a NAR does not have its hashes."""
    check, file_hash = NarCheck(info, nar.compression), hashlib.sha256()
    async for chunk in bucket.chunks(nar.url):
        file_hash.update(chunk)
        await asyncio.to_thread(deque, check.feed(chunk), 0)
    check.finish()
    if nar.file_hash not in {None, file_hash.digest()}:
        raise FormatError("the file has another FileHash")


def _cache_info_mistake(text: bytes | None, store_dir: str) -> str | None:
    """Return why Nix does not take the bucket for a cache of the store directory, or None if it does."""
    if text is None:
        return "missing, so Nix cannot use the bucket; check mirror.prefix, or write any path again"
    found = cache_info.parse(text).get("StoreDir")
    return (
        None if found == store_dir else f"its StoreDir is {found}, not {store_dir}; delete it, and write a path again"
    )


async def _wrong_others(bucket: "Bucket", contents: Contents, *, listings: bool) -> list[Finding]:
    """Read the objects beside narinfos and NARs. Return those that are malformed, or name what is missing."""
    found: list[Finding] = []

    async def check(key: str) -> None:
        text = await bucket.get(key)
        if text is not None and (what := _mistake(contents, key, text)) is not None:  # None: deleted meanwhile
            found.append(Finding(key, what))

    objects = contents.objects.items()
    keys = [key for key, _ in objects if key.startswith(("realisations/", "build-trace-v2/", "debuginfo/"))]
    if listings:
        small = (key for key, each in objects if each.size <= _MAX_LISTING_BYTES)
        keys += [key for key in small if key.endswith(".ls") and "/" not in key]
    await for_each(check, keys)
    return found


def _mistake(contents: Contents, key: str, text: bytes) -> str | None:
    """Return what is wrong with an object beside narinfos and NARs, or None."""
    try:
        value = json.loads(text)
        if key.endswith(".ls"):
            name, is_right = "version or root", value["version"] == 1 and "type" in value["root"]
        elif key.startswith("debuginfo/"):
            name = value["archive"].removeprefix("../")
            is_right = name in contents.objects
        else:
            name = StorePath(value["outPath"])
            is_right = name.hash_part in contents.paths
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, FormatError):
        return "malformed"
    return None if is_right else f"its {name} is missing"


async def for_each(function: Callable[[_T], Awaitable[None]], arguments: Iterable[_T]) -> None:
    """Call a function for each argument, MAX_READS at once. Raises the first error of a call, which ends the others."""
    waiting = iter(arguments)

    async def work() -> None:
        for argument in waiting:
            await function(argument)

    workers = [asyncio.create_task(work()) for _ in range(MAX_READS)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()

"""Check of the bucket: each narinfo has its whole NAR, with the right hashes, and all its references."""

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from harmonia.errors import FormatError
from harmonia.mirror import layout
from harmonia.nix import narinfo
from harmonia.nix.build_trace import parse_realisation
from harmonia.nix.nar_check import NarCheck
from harmonia.nix.narinfo import NarFile
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import PublicKey

if TYPE_CHECKING:
    from harmonia.mirror.bucket import Bucket, Object

_T = TypeVar("_T")

MAX_READS = 16
"""Objects that are read at once."""


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
    async for finding in _wrong_realisations(bucket, contents):
        yield finding
    if content:
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
        for finding in found:
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


async def _check_content(bucket: "Bucket", info: PathInfo, nar: NarFile) -> None:
    """Raise FormatError if a NAR does not have its hashes."""
    check, file_hash = NarCheck(info, nar.compression), hashlib.sha256()
    async for chunk in bucket.chunks(nar.url):
        file_hash.update(chunk)
        await asyncio.to_thread(deque, check.feed(chunk), 0)
    check.finish()
    if nar.file_hash not in {None, file_hash.digest()}:
        raise FormatError("the file has another FileHash")


async def _wrong_realisations(bucket: "Bucket", contents: Contents) -> AsyncIterator[Finding]:
    for key in [key for key in contents.objects if key.startswith("realisations/")]:
        with suppress(FormatError):
            _, realisation = parse_realisation(await bucket.get(key) or b"{}")
            if realisation.out_path.hash_part not in contents.paths:
                yield Finding(key, f"its path {realisation.out_path} is missing")


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

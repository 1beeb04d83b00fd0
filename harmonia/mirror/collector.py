"""Garbage collection of the bucket.

A path stays if it was written or named by `harmonia mirror` within the time to keep, or if a path that stays refers to
it. Other narinfos are deleted, referrers first, so that each narinfo in the bucket always has its closure there. Nix
remembers narinfos for 30 days, so NARs are deleted only when no narinfo has named them for that long.

An upload at the same time may rely on a path that is being deleted. So the collector writes its state to an object
before it lists the bucket and after it has ended. A writer compares this state before and after it writes a narinfo
(`CollectionState.changed`), and repeats its work if a collection ran in between.
"""

import asyncio
import json
import os
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from graphlib import TopologicalSorter
from typing import TYPE_CHECKING, NamedTuple

from harmonia.errors import FormatError
from harmonia.mirror import layout
from harmonia.mirror.verify import Contents, for_each, read_contents
from harmonia.nix.store_path import StorePath
from harmonia.upload.target import TargetError, TargetRefusedError

if TYPE_CHECKING:
    from harmonia.mirror.bucket import Bucket

_LEASE = timedelta(minutes=30)  # after which a collection that does not report itself is taken for dead
_RENEWAL_S = 60.0
_SETTLE_S = 2.0  # after which two collectors that begin at once see which of them was last
_BATCH_OBJECTS = 500


class Deletion(NamedTuple):
    key: str
    why: str


class Collector:
    """A garbage collection of the bucket of the store directory `store_dir`."""

    def __init__(self, bucket: "Bucket", store_dir: str, keep: timedelta, keep_nars: timedelta) -> None:
        """Keep paths for `keep` after they were written or named, and unused NARs for `keep_nars`."""
        self._bucket = bucket
        self._store_dir = store_dir
        self._keep = keep
        self._keep_nars = keep_nars
        self._run = uuid.uuid4().hex

    async def collect(self, report: Callable[[Deletion], None], *, dry_run: bool) -> None:
        """Delete objects, and report each. With `dry_run`, only report. Raises TargetError.

        Raises TargetRefusedError if another collection is running.
        """
        if dry_run:
            await self._collect(report, dry_run=True)
            return
        await self._acquire()
        ended = asyncio.Event()
        renewing = asyncio.create_task(self._renew(ended))
        try:
            await self._collect(report, dry_run=False)
        finally:
            ended.set()
            await renewing
            if await self._holds_lease():
                await self._write_state("done")

    async def _collect(self, report: Callable[[Deletion], None], *, dry_run: bool) -> None:
        now = datetime.now(UTC)
        contents = await read_contents(self._bucket, self._store_dir)
        objects = contents.objects
        if contents.wrong:
            what = f"{contents.wrong[0].key}: {contents.wrong[0].what}"
            raise TargetRefusedError(f"{self._bucket.url}/{what}; see harmonia mirror verify, and delete it first")
        young = {key for key, each in objects.items() if now - each.modified < self._keep}
        kept = _marked(contents, young)
        old_narinfos = [path for path in contents.paths if path not in kept]
        urls = {contents.paths[path][1].url for path in kept}
        named_until_now = {contents.paths[path][1].url for path in old_narinfos} - urls

        unused = [key for key in objects if key.startswith("nar/") and key not in urls]
        if not dry_run:
            unmarked = [url for url in unused if layout.unused_key(url) not in objects or url in named_until_now]
            await for_each(self._mark_unused, unmarked)
        for level in _referrers_first(contents, old_narinfos):
            what = f"neither written nor named for {_days(self._keep)}, and no path that stays refers to it"
            await self._delete([Deletion(f"{path}.narinfo", what) for path in level], report, dry_run=dry_run)

        await self._delete([each async for each in self._leftovers(contents, kept, young)], report, dry_run=dry_run)
        expired = [
            url
            for url in unused
            if url not in named_until_now
            and (mark := objects.get(layout.unused_key(url))) is not None
            and now - mark.modified >= self._keep_nars
        ]
        what = f"no narinfo has named it for {_days(self._keep_nars)}"
        await self._delete([Deletion(url, what) for url in expired], report, dry_run=dry_run)
        if not dry_run:
            marks = [key for key in objects if key.startswith(layout.UNUSED)]
            used_again = [key for key in marks if key.removeprefix(layout.UNUSED) in urls]
            await self._bucket.delete([*used_again, *map(layout.unused_key, expired)])

    async def _leftovers(
        self, contents: Contents, kept: Collection[str], young: Collection[str]
    ) -> AsyncIterator[Deletion]:
        """Yield the objects beside the narinfos that belong to no path that stays."""
        derivers = {layout.log_key(info.deriver) for path in kept if (info := contents.paths[path][0]).deriver}
        urls = {contents.paths[path][1].url for path in kept}
        for key in contents.objects:
            if key in young:
                continue
            folder = key.partition("/")[0]
            if key.endswith(".ls") and key.removesuffix(".ls") not in kept:
                yield Deletion(key, "its path does not stay")
            elif folder == "log" and key not in derivers:
                yield Deletion(key, "no path that stays was built by this derivation")
            elif folder in {"realisations", "build-trace-v2"} and await self._out_path(key) not in kept:
                yield Deletion(key, "its path does not stay")
            elif folder == "debuginfo" and await self._archive(key) not in urls:
                yield Deletion(key, "the path with the debug info does not stay")
            elif key.startswith(layout.ROOTS):
                yield Deletion(key, f"this root was not named for {_days(self._keep)}")

    async def _out_path(self, key: str) -> str:
        try:
            text = await self._bucket.get(key) or b"{}"
            return StorePath(json.loads(text)["outPath"]).hash_part
        except (ValueError, LookupError, TypeError, FormatError):
            return ""

    async def _archive(self, key: str) -> str:
        try:
            return str(json.loads(await self._bucket.get(key) or b"{}")["archive"]).removeprefix("../")
        except (ValueError, LookupError, TypeError):
            return ""

    async def _mark_unused(self, url: str) -> None:
        await self._bucket.replace(layout.unused_key(url), b"", "text/plain")

    async def _delete(
        self, deletions: Collection[Deletion], report: Callable[[Deletion], None], *, dry_run: bool
    ) -> None:
        for first in range(0, len(deletions), _BATCH_OBJECTS):
            batch = [*deletions][first : first + _BATCH_OBJECTS]
            if not dry_run:
                await self._check_lease()
                await self._bucket.delete(each.key for each in batch)
            for each in batch:
                report(each)

    async def _acquire(self) -> None:
        state = await CollectionState.read(self._bucket)
        if state.is_alive:
            last = f"{state.written:%Y-%m-%d %H:%M} UTC"
            what = f"another garbage collection runs on {state.host}; it last reported at {last}"
            raise TargetRefusedError(
                f"{self._bucket.url}: {what}; wait until it ends; if it was killed, run this command 30 minutes later"
            )
        await self._write_state("running")
        await asyncio.sleep(_SETTLE_S)
        await self._check_lease()

    async def _renew(self, ended: asyncio.Event) -> None:
        """Renew the lease until it is lost, or the collection has ended."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_RENEWAL_S):
                    await ended.wait()
                    return
            with suppress(TargetError):  # `_check_lease` stops the collection if this lasts
                if not await self._holds_lease():
                    return
                await self._write_state("running")

    async def _holds_lease(self) -> bool:
        state = await CollectionState.read(self._bucket)
        return state.run == self._run and state.is_alive

    async def _check_lease(self) -> None:
        """Raise TargetRefusedError if another collection may run, for example because this process was suspended."""
        if not await self._holds_lease():
            what = "lost its lease: another one has begun, or renewals failed"
            raise TargetRefusedError(f"{self._bucket.url}: this garbage collection {what}; run it again later")

    async def _write_state(self, state: str) -> None:
        value = {"run": self._run, "state": state, "host": f"{socket.gethostname()}:{os.getpid()}"}
        text = json.dumps(value | {"written": datetime.now(UTC).isoformat()}).encode()
        await self._bucket.replace(layout.COLLECTION, text, layout.JSON_TYPE)


class CollectionState(NamedTuple):
    """The state of the last garbage collection of a bucket."""

    run: str
    """The name of the collection; empty if there was none."""
    is_running: bool
    host: str
    written: datetime

    @classmethod
    async def read(cls, bucket: "Bucket") -> "CollectionState":
        """Return the state. Raises TargetError, also if the state is malformed."""
        text = await bucket.get(layout.COLLECTION)
        if text is None:
            return cls("", False, "", datetime.min.replace(tzinfo=UTC))
        try:
            value = json.loads(text)
            written = datetime.fromisoformat(value["written"])
            if written.tzinfo is None:
                raise ValueError("no time zone")
            return cls(str(value["run"]), value["state"] == "running", str(value["host"]), written)
        except (ValueError, LookupError, TypeError):
            raise TargetRefusedError(f"{bucket.url}/{layout.COLLECTION}: malformed; delete it") from None

    @property
    def is_alive(self) -> bool:
        """Return True if a collection runs, and has reported itself lately."""
        return self.is_running and datetime.now(UTC) - self.written < _LEASE

    def changed(self, later: "CollectionState") -> bool:
        """Return True if a collection may have run between this state and a later one."""
        return self.is_running or later.is_running or self.run != later.run


def _marked(contents: Contents, young: Collection[str]) -> set[str]:
    """Return the hash parts of the paths that stay: young ones, young roots, and their closures."""
    named = {key.removeprefix(layout.ROOTS)[:32] for key in young if key.startswith(layout.ROOTS)}
    waiting = [path for path in contents.paths if path in named or f"{path}.narinfo" in young]
    kept = set(waiting)
    while waiting:
        for reference in contents.paths[waiting.pop()][0].references:
            if reference.hash_part in contents.paths and reference.hash_part not in kept:
                kept.add(reference.hash_part)
                waiting.append(reference.hash_part)
    return kept


def _referrers_first(contents: Contents, paths: Iterable[str]) -> Iterable[list[str]]:
    """Return paths in groups, such that no path of a group refers to one of an earlier group."""
    chosen = set(paths)
    referrers: TopologicalSorter[str] = TopologicalSorter(dict.fromkeys(chosen, ()))
    for path in chosen:
        for reference in contents.paths[path][0].references:
            if reference.hash_part in chosen and reference.hash_part != path:
                referrers.add(reference.hash_part, path)
    referrers.prepare()
    while referrers.is_active():
        group = [*referrers.get_ready()]
        yield group
        referrers.done(*group)


def _days(time: timedelta) -> str:
    return f"{time.total_seconds() / 86400:g} days"

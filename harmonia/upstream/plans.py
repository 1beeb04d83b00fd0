"""Plans: closures of an upstream, remembered so that the narinfos that a client wants next need no request.

Nix asks for the narinfos of a closure one after the other, each after a round trip. A Harmonia has all of them in one
response (`/<hash>.closure`), which `nix-cache-info` announces. Each narinfo in it is checked like any other. If a plan
lacks a reference of its paths, the upstream does not have that path.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, TypeVar

from cachetools import TLRUCache, TTLCache

from harmonia.errors import UpstreamError
from harmonia.nix import narinfo
from harmonia.nix.store_path import HASH_PART_LENGTH
from harmonia.upstream.client import Client
from harmonia.upstream.lookup_cache import NEGATIVE_TTL_S, POSITIVE_TTL_S
from harmonia.upstream.refusals import UpstreamMismatchError
from harmonia.upstream.remote_path import RemotePath, memory_bytes, parse_now

_MAX_BYTES = 32 << 20  # about: 8,000 paths
_MAX_MISSES = 20_000
_MAX_TEXT_BYTES = 32 << 20  # of a plan: 10,000 narinfos
BATCH = 200  # paths or misses that are remembered in one turn of the event loop
_MAX_HAVE = 32  # earlier plans that a request names, so that their paths are not sent again
_PAUSE_S = 30.0  # after a plan that failed
_MAX_WITHOUT_PLAN = 1000  # remembered paths for which the upstream has no plan, because it would be too long

_T = TypeVar("_T")

Spawn = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]


class _Known:
    """A path of a plan, and its position in the order of all plans, references first."""

    __slots__ = ("path", "position", "size")

    def __init__(self, path: RemotePath, position: int) -> None:
        self.path = path
        self.position = position
        self.size = memory_bytes(path.narinfo_size)


PlanMemory = MutableMapping[tuple[Client, str], _Known]
"""The paths in the plans of all upstreams, by upstream and hash part."""


def new_memory() -> PlanMemory:
    memory: PlanMemory = TLRUCache(  # older cachetools have no types
        _MAX_BYTES, lambda _key, _value, now: now + POSITIVE_TTL_S, getsizeof=attrgetter("size")
    )
    return memory


@dataclass(frozen=True, slots=True)
class _Plan:
    """A plan whose narinfos are accepted, as far as there is memory for it."""

    paths: list[RemotePath]
    """References come first."""
    missing: list[str]
    """Hash parts of references that the plan lacks."""


class Plans:
    """The plans of one upstream, on one event loop."""

    def __init__(self, client: Client, spawn: Spawn, memory: PlanMemory) -> None:
        """Create it without plans. `spawn` starts a task that outlives the request."""
        self._client = client
        self._spawn = spawn
        self._memory = memory
        self._missing: MutableMapping[str, bool] = TTLCache(_MAX_MISSES, NEGATIVE_TTL_S)
        self._roots: deque[str] = deque(maxlen=_MAX_HAVE)
        self._without_plan: MutableMapping[str, bool] = TTLCache(_MAX_WITHOUT_PLAN, POSITIVE_TTL_S)
        self._positions = 0
        self._running: asyncio.Task[None] | None = None
        self._not_before = 0.0

    def find(self, hash_part: str) -> RemotePath | None:
        """Return the path with this hash part if a plan has it."""
        known = self._memory.get((self._client, hash_part))
        return None if known is None else known.path

    def forget(self, hash_part: str) -> None:
        """Forget a path, because its NAR could not be downloaded: its narinfo is requested again."""
        self._memory.pop((self._client, hash_part), None)

    def position(self, hash_part: str) -> int | None:
        """Return the position of a path in the order of all plans, in which references come first."""
        known = self._memory.get((self._client, hash_part))
        return None if known is None else known.position

    def is_missing(self, hash_part: str) -> bool:
        """Return True if a recent plan shows that the upstream does not have the path."""
        return hash_part in self._missing

    async def prepare(self, path: RemotePath, headers: Mapping[str, str], patience: float) -> None:
        """Fetch the plan of a path that a client has asked for, if its references are not known yet.

        Waits at most `patience` seconds; a later plan is remembered, too. One plan is fetched at a time, because the
        next one may be a part of it.
        """
        if self._client.closure_suffix is None:
            return
        loop = asyncio.get_running_loop()
        deadline = loop.time() + patience
        while self._is_needed(path) and loop.time() < deadline:
            is_ours = self._running is None or self._running.done()
            if is_ours:
                self._running = self._spawn(self._fetch(path, headers))
            assert self._running is not None  # noqa: S101 (set above)
            await asyncio.wait({self._running}, timeout=deadline - loop.time())
            if is_ours:
                break
        if not self._knows(path.info.path.hash_part):  # its references are known, or there is no plan
            self._remember(path)

    def _knows(self, hash_part: str) -> bool:
        return (self._client, hash_part) in self._memory

    def _remember(self, path: RemotePath) -> None:
        self._positions += 1
        self._memory[self._client, path.info.path.hash_part] = _Known(path, self._positions)
        self._missing.pop(path.info.path.hash_part, None)

    def _is_needed(self, path: RemotePath) -> bool:
        own = path.info.path.hash_part
        if own in self._without_plan or asyncio.get_running_loop().time() < self._not_before:
            return False
        hash_parts = (reference.hash_part for reference in path.info.references)
        return any(not self._knows(each) and each not in self._missing for each in hash_parts if each != own)

    async def _fetch(self, path: RemotePath, headers: Mapping[str, str]) -> None:
        root = path.info.path.hash_part
        have = [each for each in self._roots if self._knows(each)]
        url = f"{root}{self._client.closure_suffix}" + (f"?have={','.join(have)}" if have else "")
        sent = {**headers, "Accept-Encoding": "zstd"}
        try:
            plan = await self._client.request_long(url, sent, partial(_parse, self._client), _MAX_TEXT_BYTES)
        except UpstreamError:
            self._not_before = asyncio.get_running_loop().time() + _PAUSE_S
            return
        if plan is None:
            self._without_plan[root] = True
            return
        async for each in in_turns(plan.paths):
            self._remember(each)
        self._roots.append(root)
        if not have:  # otherwise, a path that is not there may be known from an earlier plan, and be evicted
            async for hash_part in in_turns(plan.missing):
                self._missing[hash_part] = True


async def in_turns(values: Sequence[_T]) -> AsyncGenerator[_T]:
    """Yield the values, and let other tasks of the event loop run in between."""
    for number, value in enumerate(values, 1):
        yield value
        if number % BATCH == 0:
            await asyncio.sleep(0)


def _parse(client: Client, text: bytes) -> _Plan:
    """Return the plan in a response, in any thread. Narinfos that are refused are logged and counted.

    If the response is too long for `_MAX_BYTES`, its last narinfos count, because Nix asks for them first.
    """
    start = f"StorePath: {client.store_dir}/"
    narinfos = {
        each.removeprefix(start)[:HASH_PART_LENGTH]: each
        for each in narinfo.split(text.decode(errors="surrogateescape"))
    }
    paths: deque[RemotePath] = deque()
    refused: set[str] = set()
    memory = 0
    for hash_part, each in reversed(narinfos.items()):
        memory += memory_bytes(len(each))
        if memory > _MAX_BYTES:
            break
        try:
            paths.appendleft(parse_now(client, hash_part, each.encode(errors="surrogateescape")))
        except UpstreamMismatchError:  # logged
            refused.add(hash_part)
    missing: dict[str, None] = {}
    for hash_part in (reference.hash_part for path in paths for reference in path.info.references):
        if hash_part not in narinfos or hash_part in refused:
            missing[hash_part] = None
        if len(missing) == _MAX_MISSES:
            break
    return _Plan(list(paths), list(missing))

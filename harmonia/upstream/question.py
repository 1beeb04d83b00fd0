"""What all upstreams together know of a path. Each question is asked once, however many want to know."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Self, TypeVar

from harmonia.errors import FormatError, UpstreamError
from harmonia.nix import base32, narinfo
from harmonia.nix.narinfo import NarFile
from harmonia.nix.path_info import PathInfo
from harmonia.upstream.client import ASKED, HOPS, Client

POSITIVE_TTL = 3600.0  # seconds: as long as no signature is withdrawn, what is said of a path stays true
_NEGATIVE_TTL = 30.0  # seconds: long enough for a client that asks twice, short for one who waits for a build
_REMEMBERED = 16384  # answers, up to 2 KiB each
_MOST_HOPS = 8

_T = TypeVar("_T")

_log = logging.getLogger("harmonia")


@dataclass(frozen=True, slots=True)
class Hops:
    """Through which Harmonias a question came, and whom else they have asked, by the names that those give themselves.

    Those asked are not asked again: among n caches that all know each other, a question would come by each way through
    them, of which there are n!.
    """

    through: tuple[str, ...] = ()
    asked: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, through: str, asked: str) -> Self:
        return cls(tuple(_words(through)), frozenset(_words(asked)))

    def headers(self, identity: str, clients: Sequence[Client]) -> dict[str, str]:
        asked = self.asked | {client.identity for client in clients if client.identity}
        return {HOPS: ", ".join((*self.through, identity)), ASKED: ", ".join(sorted(asked))}


def _words(header: str) -> list[str]:
    return [word for part in header[:8192].split(",") if (word := part.strip()[:64].rstrip())]


@dataclass(frozen=True, slots=True)
class Found:
    """A path that an upstream has, as it says."""

    client: Client
    info: PathInfo
    nar: NarFile
    verified: bool
    """Whether one of the upstream's public keys has signed it."""
    url: str
    """Where its NAR really is."""

    @property
    def name(self) -> str:
        """What its NAR is called here. All that is needed to find it again, also after a restart, is in it."""
        file_hash = f"-{base32.encode(self.nar.file_hash)}" if self.nar.file_hash else ""
        return f"{self.info.path.hash_part}-{base32.encode(self.info.nar_hash)}{file_hash}.nar.{self.nar.compression}"


class Upstreams:
    def __init__(self, clients: Sequence[Client], identity: str, store_dir: str, bound: float) -> None:
        """`bound` is after how many seconds a question is answered with no, whoever has yet to answer."""
        self.clients = sorted(clients, key=lambda client: client.settings.priority)
        self.identity = identity
        self.by_id = {client.id: client for client in clients}
        self._store_dir = store_dir
        self._bound = bound
        self._known: OrderedDict[tuple[str, Hops], tuple[float, Found | None]] = OrderedDict()
        self._asking: dict[Hashable, asyncio.Task[Found | None]] = {}

    def start(self) -> None:
        for client in self.clients:
            client.breaker.start(self._bound)

    async def close(self) -> None:
        tasks = list(self._asking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for client in self.clients:
            await client.close()

    def closed_to(self, hops: Hops) -> bool:
        """Whether a request has been here already, or almost everywhere else."""
        return self.identity in hops.through or len(hops.through) >= _MOST_HOPS

    async def find(self, hash_part: str, hops: Hops) -> Found | None:
        """Who has the path with that hash part. None also where nobody has told in time: then the next may hear it."""
        if self.closed_to(hops):
            return None
        now = asyncio.get_running_loop().time()
        # What is there is there for all. What is not may be so only for a question that came the same way.
        for key in ((hash_part, Hops()), (hash_part, hops)):
            expires, known = self._known.get(key, (0.0, None))
            if expires > now and (known.client.identity not in hops.through if known else key[1] == hops):
                return known
        task = self._once((hash_part, hops), lambda: self._ask(hash_part, hops))
        done, _ = await asyncio.wait({task}, timeout=self._bound)
        return task.result() if done else None

    def forget(self, found: Found) -> None:
        """It is no longer true."""
        for key in [key for key, (_, known) in self._known.items() if known is found]:
            del self._known[key]

    async def find_at(self, client: Client, hash_part: str, hops: Hops) -> Found | None:
        """What that upstream says of the path. UpstreamError where it does not answer."""
        known = self._known.get((hash_part, Hops()), (0.0, None))[1]
        if known is not None and known.client is client:
            return known
        return await asyncio.shield(
            self._once((client, hash_part, hops), lambda: self._ask_at(client, hash_part, hops))
        )

    def _once(
        self, question: Hashable, ask: Callable[[], Coroutine[Any, Any, Found | None]]
    ) -> "asyncio.Task[Found | None]":
        """The answer to a question that is asked once at a time, however many want to know."""
        task = self._asking.get(question)
        if task is None:
            task = self._asking[question] = asyncio.create_task(ask())
            task.add_done_callback(lambda _: self._asking.pop(question, None))
            task.add_done_callback(lambda task: task.cancelled() or task.exception())  # all may have gone away
        return task

    async def first(
        self,
        ask: Callable[[Client, dict[str, str]], Awaitable[_T | None]],
        hops: Hops,
        discard: Callable[[_T], None] = lambda _: None,
    ) -> tuple[_T | None, bool]:
        """The first answer of all upstreams, and whether all have answered that were to be asked.

        Those of the lowest priority are asked first, all at once; others when these have no answer, or keep us waiting.
        """
        clients = [client for client in self.clients if not {client.identity} & {*hops.through, *hops.asked}]
        headers = hops.headers(self.identity, clients)
        tiers = [list(tier) for _, tier in groupby(clients, lambda client: client.settings.priority)]
        running: set[asyncio.Task[_T | None]] = set()
        sure = len(clients) == len(self.clients)
        try:
            for number, tier in enumerate(tiers):
                running |= {asyncio.ensure_future(ask(client, headers)) for client in tier}
                last = number == len(tiers) - 1
                deadline = None if last else asyncio.get_running_loop().time() + self._bound / (len(tiers) + 1)
                while running:
                    timeout = None if deadline is None else deadline - asyncio.get_running_loop().time()
                    done, _ = await asyncio.wait(running, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                    if not done:
                        break
                    for task in done:
                        if isinstance(error := task.exception(), UpstreamError):
                            sure = False
                            running.discard(task)
                        elif error is not None:
                            raise error
                        elif (answer := task.result()) is not None:
                            running.discard(task)
                            return answer, True
                        else:
                            running.discard(task)
            return None, sure
        finally:
            for task in running:
                task.cancel()
                task.add_done_callback(lambda task: _discard(task, discard))

    async def get(
        self,
        ask: Callable[[Client, dict[str, str]], Awaitable[_T | None]],
        hops: Hops,
        discard: Callable[[_T], None] = lambda _: None,
    ) -> _T | None:
        """The first answer of all upstreams, within the bound."""
        if self.closed_to(hops):
            return None
        try:
            async with asyncio.timeout(self._bound):
                return (await self.first(ask, hops, discard))[0]
        except TimeoutError:
            return None

    async def _ask(self, hash_part: str, hops: Hops) -> Found | None:
        found, sure = await self.first(lambda client, headers: self._narinfo(client, hash_part, headers), hops)
        if found or sure:
            self._remember(hash_part, hops, found)
        return found

    async def _ask_at(self, client: Client, hash_part: str, hops: Hops) -> Found | None:
        found = await self._narinfo(client, hash_part, hops.headers(self.identity, [client]))
        if found and (hash_part, Hops()) not in self._known:  # who comes first among all upstreams stays first
            self._remember(hash_part, hops, found)
        return found

    def _remember(self, hash_part: str, hops: Hops, found: Found | None) -> None:
        ttl = POSITIVE_TTL if found else _NEGATIVE_TTL
        key = hash_part, Hops() if found else hops
        self._known[key] = asyncio.get_running_loop().time() + ttl, found
        self._known.move_to_end(key)
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    async def _narinfo(self, client: Client, hash_part: str, headers: dict[str, str]) -> Found | None:
        """What that upstream says of the path, if we may believe it."""
        text = await client.ask_small(f"{hash_part}.narinfo", headers)
        if text is None:
            client.counters.add("misses")
            return None
        try:
            info, nar = narinfo.parse(text.decode(), self._store_dir)
            if info.path.hash_part != hash_part:
                raise FormatError("it is of another path")
            fingerprint = info.fingerprint(self._store_dir)
            verified = any(key.verify(fingerprint, sig) for key in client.keys for sig in info.sigs)
            if client.keys and not verified:
                raise FormatError("none of the public_keys has signed it")
            found = Found(client, info, nar, verified, client.nar_url(nar.url))
        except (FormatError, UnicodeDecodeError) as error:
            what = error if isinstance(error, FormatError) else "it is no text"
            _log.warning("%s/%s.narinfo is not passed on: %s", client.base, hash_part, what)
            client.counters.add("refused")
            return None
        client.counters.add("hits")
        return found


def _discard(task: "asyncio.Task[_T | None]", discard: Callable[[_T], None]) -> None:
    if not task.cancelled() and task.exception() is None and (answer := task.result()) is not None:
        discard(answer)

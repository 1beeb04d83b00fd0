"""What all upstreams together know of a path. Each question is asked once, however many want to know."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Coroutine, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, TypeVar

import aiohttp

from harmonia.errors import FormatError, UpstreamError
from harmonia.nix import base32, narinfo
from harmonia.nix.narinfo import NarFile
from harmonia.nix.path_info import PathInfo
from harmonia.upstream.client import Client
from harmonia.upstream.hops import Hops
from harmonia.upstream.nar_name import NarName
from harmonia.upstream.tasks import Tasks
from harmonia.upstream.transport import Part

POSITIVE_TTL = 3600.0  # seconds: as long as no signature is withdrawn, what is said of a path stays true
_NEGATIVE_TTL = 30.0  # seconds: long enough for a client that asks twice, short for one who waits for a build
_MEMORY = 32 << 20  # bytes, about, for answers that are remembered: some 20,000 paths, or 60,000 that nobody has

_LONG = 32 << 10  # bytes of a narinfo that are not looked at on the event loop: signatures take 0.1 ms each

_T = TypeVar("_T")
Ask = Callable[[Client, dict[str, str]], Coroutine[Any, Any, _T | None]]
"""Asks one upstream something, with these headers. UpstreamError where it fails."""

_log = logging.getLogger("harmonia")


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
    size: int
    """Bytes of its narinfo."""

    @property
    def name(self) -> NarName:
        file = self.client.id if self.nar.file_hash is None else base32.encode(self.nar.file_hash)
        return NarName(self.info.path.hash_part, base32.encode(self.info.nar_hash), file, self.nar.compression)

    async def ask(
        self, headers: Mapping[str, str], part: Part, method: str = "GET", *, checked: bool = True
    ) -> aiohttp.ClientResponse:
        """The answer to a request for its NAR, or a part of it. UpstreamError where there is none."""
        return await self.client.nar(self.url, headers, method, part, anywhere=checked)


class Upstreams:
    def __init__(self, clients: Sequence[Client], identity: str, store_dir: str, bound: float) -> None:
        """`bound` is after how many seconds a question is answered with no, whoever has yet to answer."""
        self.clients = sorted(clients, key=lambda client: client.settings.priority)
        self.identity = identity
        self._store_dir = store_dir
        self._bound = bound
        self._known = _Answers(_MEMORY)
        self._asking: dict[Hashable, asyncio.Task[Found | None]] = {}
        self._tasks = Tasks()

    def start(self) -> None:
        for client in self.clients:
            client.breaker.start(self._bound)

    async def close(self) -> None:
        await self._tasks.stop()
        for client in self.clients:
            await client.close()

    async def find(self, hash_part: str, hops: Hops) -> Found | None:
        """Who has the path with that hash part. None also where nobody has told in time: then the next may hear it."""
        if hops.is_over(self.identity):
            return None
        # Who has it has it for all. Who has not may have been kept from asking others, by the way the question came.
        for key in ((hash_part, Hops()), (hash_part, hops)):
            known = self._known.get(key)
            if known is not None and not (known.found and known.found.client.identity in hops.through):
                return known.found
        task = self._once((hash_part, hops), lambda: self._find(hash_part, hops))
        done, _ = await asyncio.wait({task}, timeout=self._bound)
        return task.result() if done else None

    async def find_nar(self, name: NarName, hops: Hops, failed: Collection[Client] = ()) -> Found | None:
        """Who has the NAR of that name, or one like it: packed anew, perhaps, but in the same compression.

        Nobody who has failed. This takes its time: a client that asks for a NAR knows that there is one.
        """
        if hops.is_over(self.identity):
            return None
        known = self._known.get((name.hash_part, Hops()))
        if known and known.found and known.found.name == name and known.found.client not in failed:
            return known.found
        return await asyncio.shield(self._once((name, hops, *failed), lambda: self._find_nar(name, hops, failed)))

    def forget(self, found: Found) -> None:
        """It is no longer true."""
        self._known.forget((found.info.path.hash_part, Hops()))

    async def get(self, ask: Ask[_T], hops: Hops, discard: Callable[[_T], object] = lambda _: None) -> _T | None:
        """The first answer of all upstreams, within the bound. What comes later, or second, is discarded."""
        if hops.is_over(self.identity):
            return None

        async def first() -> _T | None:
            return (await self._first(ask, hops, discard))[0]

        task = self._tasks.begin(first())
        try:
            await asyncio.wait({task}, timeout=self._bound)
            return task.result() if task.done() else None
        finally:
            if not task.done():
                task.add_done_callback(partial(_discard, discard))

    async def _first(
        self, ask: Ask[_T], hops: Hops, discard: Callable[[_T], object] = lambda _: None
    ) -> tuple[_T | None, bool]:
        """The first answer of all upstreams, and whether all have answered that were to be asked.

        Those of the lowest priority are asked first, all at once; others when these have no answer, or keep us waiting.
        Whoever is slower is still heard out: else its connection had to be closed, and its slowness went unnoticed.
        """
        clients = [client for client in self.clients if client.identity not in {*hops.through, *hops.asked}]
        headers = hops.headers(self.identity, [client.identity for client in clients])
        tiers = [list(tier) for _, tier in groupby(clients, lambda client: client.settings.priority)]
        running: set[asyncio.Task[_T | None]] = set()
        sure = len(clients) == len(self.clients)
        try:
            for tier in tiers:
                running |= {self._tasks.begin(ask(client, headers)) for client in tier}
                patience = None if tier is tiers[-1] else self._bound / (len(tiers) + 1)
                with suppress(TimeoutError):
                    async with asyncio.timeout(patience):
                        while running:
                            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                            failed = {task for task in done if isinstance(task.exception(), UpstreamError)}
                            sure = sure and not failed
                            answers = [task for task in done - failed if task.result() is not None]
                            running |= set(answers[1:])  # to be discarded
                            if answers:
                                return answers[0].result(), True
            return None, sure
        finally:
            for task in running:
                task.add_done_callback(partial(_discard, discard))

    async def _find(self, hash_part: str, hops: Hops) -> Found | None:
        found, sure = await self._first(lambda client, headers: self._narinfo(client, hash_part, headers), hops)
        if found or sure:
            self._known.remember((hash_part, Hops() if found else hops), found)
        return found

    async def _find_nar(self, name: NarName, hops: Hops, failed: Collection[Client]) -> Found | None:
        alike: list[Found] = []

        async def ask(client: Client, headers: dict[str, str]) -> Found | None:
            if client in failed or not name.may_be_at(client.id):
                return None
            found = await self._narinfo(client, name.hash_part, headers)
            if found and (found.name.nar_hash, found.name.compression) == (name.nar_hash, name.compression):
                if found.name == name:
                    return found
                alike.append(found)
            return None

        found, _ = await self._first(ask, hops)
        return found or next(iter(alike), None)

    def _once(
        self, question: Hashable, ask: Callable[[], Coroutine[Any, Any, Found | None]]
    ) -> "asyncio.Task[Found | None]":
        """The answer to a question that is asked once at a time, however many want to know."""
        task = self._asking.get(question)
        if task is None:
            task = self._asking[question] = self._tasks.begin(ask())
            task.add_done_callback(lambda _: self._asking.pop(question, None))
            task.add_done_callback(lambda task: task.cancelled() or task.exception())  # all may have gone away
        return task

    async def _narinfo(self, client: Client, hash_part: str, headers: dict[str, str]) -> Found | None:
        """What that upstream says of the path, if we may believe it."""
        text = await client.ask_small(f"{hash_part}.narinfo", headers)
        if text is None:
            client.counters.add("misses")
            return None
        try:
            parse = partial(self._parse, client, hash_part, text)
            found = parse() if len(text) < _LONG else await asyncio.to_thread(parse)
        except FormatError as error:
            _log.warning("%s/%s.narinfo is not passed on: %s", client.base, hash_part, error)
            client.counters.add("refused")
            return None
        client.counters.add("hits")
        return found

    def _parse(self, client: Client, hash_part: str, text: bytes) -> Found:
        try:
            info, nar = narinfo.parse(text.decode(), self._store_dir)
        except UnicodeDecodeError:
            raise FormatError("it is no text") from None
        if info.path.hash_part != hash_part:
            raise FormatError("it is of another path")
        fingerprint = info.fingerprint(self._store_dir)
        verified = any(key.verify(fingerprint, sig) for key in client.keys for sig in info.sigs)
        if client.keys and not verified:
            raise FormatError("none of the public_keys has signed it")
        return Found(client, info, nar, verified, client.nar_url(nar.url), len(text))


@dataclass(frozen=True, slots=True)
class _Answer:
    found: Found | None
    expires: float
    size: int
    """Bytes of memory, about."""


class _Answers:
    """What is remembered, each for its time; in bounded memory, of which what was used longest ago goes first."""

    def __init__(self, memory: int) -> None:
        self._left = memory
        self._by_question: OrderedDict[tuple[str, Hops], _Answer] = OrderedDict()

    def get(self, question: tuple[str, Hops]) -> _Answer | None:
        answer = self._by_question.get(question)
        if answer is None or answer.expires < asyncio.get_running_loop().time():
            return None
        self._by_question.move_to_end(question)
        return answer

    def remember(self, question: tuple[str, Hops], found: Found | None) -> None:
        self.forget(question)
        ttl = POSITIVE_TTL if found else _NEGATIVE_TTL
        # Objects in Python take more than the text that they were made of.
        size = 500 + 100 * (len(question[1].through) + len(question[1].asked)) + (1000 + 3 * found.size if found else 0)
        self._by_question[question] = _Answer(found, asyncio.get_running_loop().time() + ttl, size)
        self._left -= size
        while self._left < 0:
            self.forget(next(iter(self._by_question)))

    def forget(self, question: tuple[str, Hops]) -> None:
        answer = self._by_question.pop(question, None)
        self._left += answer.size if answer else 0


def _discard(discard: Callable[[_T], object], task: "asyncio.Task[_T | None]") -> None:
    if not task.cancelled() and task.exception() is None and (answer := task.result()) is not None:
        discard(answer)

"""Events of the store and of all workers, as server-sent events for clients of `/events`.

Each worker records its own events (process/event_log.py). Of the workers with clients, one records those of the store
for all (store_events.py). Each worker reads the log into memory, once for all of its clients. A client holds only
the number of its last event, so a slow one takes no memory.
"""

import asyncio
import json
import logging
import math
import os
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from itertools import takewhile

from sanic.exceptions import ServiceUnavailable

from harmonia.cache.zstd_frames import Source
from harmonia.config.settings import Settings
from harmonia.errors import EventLogError, StoreUnavailableError
from harmonia.nix.store_path import StorePath
from harmonia.process.event_log import GAP, MAX_EVENTS, Event, EventLog, Leadership, Recorder
from harmonia.server.http.auth import too_many
from harmonia.server.http.rate_limit import network
from harmonia.server.path_lookup import Paths
from harmonia.server.store_events import COLLECTED, VALID, StoreEvents

SERVED, COMPRESSED = "served", "compressed"
NAMES = (VALID, COLLECTED, SERVED, COMPRESSED)
"""Names of events that a client may select. It gets GAP in any case."""
_MAX_LISTENERS = 256
_MAX_LISTENERS_PER_CLIENT = 8
_MAX_BATCH = 100  # events sent at once
_LOOK_INTERVAL_S = 0.1
_IDLE_INTERVAL_S = 1.0  # between two looks if this worker has no client any more
_HEARTBEAT_S = 15.0  # proxies close connections without traffic, often after 60 s
_SLOW_S = 30.0  # after which a client that does not read is disconnected
_RETRY_WHEN_FULL_S = 60.0
_RETRY_MS = 2000  # after which browsers reconnect

_log = logging.getLogger("harmonia")


class Listener:
    """A client of `/events`."""

    def __init__(
        self, client: str, names: Collection[str], after: int | None, abort: Callable[[], None], until: float = math.inf
    ) -> None:
        """`after` is the number of its last event, or None for new events only. `abort` disconnects the client.

        `until` is the end of its token, in seconds since 1970.
        """
        self.until = until
        self.client = network(client)
        self.names = names
        self.after = after
        self.abort = abort
        self.sending_since = math.inf
        """The time since when the client has been reading what was sent last, or infinity."""


class Events:
    """The events for the clients of one worker. Not thread-safe, except where a method says so."""

    def __init__(self, settings: Settings, paths: Paths) -> None:
        """Open nothing yet, so that the process may still fork."""
        directory = os.path.join(str(settings.cache_dir), "events")
        self.recorder = Recorder(directory)
        self.disconnected = 0
        """The number of clients that were disconnected because they read too slowly."""
        self._store_dir = settings.virtual_nix_store
        self._paths = paths
        self._listeners: set[Listener] = set()
        self._clients: Counter[str] = Counter()
        self._over = False

        self._log = EventLog(directory)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="events")
        self._recent: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._news = asyncio.Event()
        self._starting = asyncio.Lock()
        self._following: asyncio.Task[None] | None = None

        self._store_events = StoreEvents(settings, EventLog(directory), Leadership(directory), paths.policy)
        self._store_thread = ThreadPoolExecutor(1, thread_name_prefix="path-changes")
        self._recording: asyncio.Future[None] | None = None
        """The last run of `_record_store_events` in its thread."""

    def served(self, path: StorePath, sent: int, *, complete: bool = True) -> None:
        """Record a response with the NAR of a path, or a part of it. Thread-safe."""
        if self.recorder.is_recording:
            self.recorder.record(SERVED, path=f"{self._store_dir}/{path}", bytes=sent, complete=complete)

    def compressed(self, source: Source, file_size: int) -> None:
        """Record that the NAR of a path was compressed. Thread-safe."""
        if self.recorder.is_recording:
            path = f"{self._store_dir}/{os.path.basename(str(source))}"
            self.recorder.record(COMPRESSED, path=path, narSize=source.size, downloadSize=file_size)

    async def listen(self, listener: Listener) -> AsyncGenerator[bytes]:
        """Yield events for a client, in the format text/event-stream (HTML Living Standard, section 9.2).

        Raises SanicException before the first byte if there are too many clients, or if the worker stops. Raises
        EventLogError or StoreUnavailableError if the events cannot be read.
        """
        self._admit(listener)
        try:
            async with aclosing(self._texts(listener)) as texts:
                async for text in texts:
                    listener.sending_since = time.monotonic()
                    yield text.encode()
                    listener.sending_since = math.inf
        finally:
            self._listeners.discard(listener)
            self._clients[listener.client] -= 1
            if not self._clients[listener.client]:
                del self._clients[listener.client]

    def _admit(self, listener: Listener) -> None:
        if self._over or len(self._listeners) >= _MAX_LISTENERS:
            raise ServiceUnavailable("this worker stops, or has too many clients of /events")
        # A proxy on a unix socket stands for many clients.
        if listener.client != "unix" and self._clients[listener.client] >= _MAX_LISTENERS_PER_CLIENT:
            raise too_many(_RETRY_WHEN_FULL_S)
        self._listeners.add(listener)
        self._clients[listener.client] += 1

    async def _texts(self, listener: Listener) -> AsyncGenerator[str]:
        await self._start()
        newest = self._recent[-1].number
        after = newest if listener.after is None else listener.after
        yield f"retry: {_RETRY_MS}\nid: {after}\n\n"
        if after > newest:  # of a log that was replaced
            after = 0
        while listener in self._listeners and time.time() < listener.until:
            news = self._news
            events = self._recent_after(after)
            if not events:
                try:
                    async with asyncio.timeout(min(_HEARTBEAT_S, listener.until - time.time())):
                        await news.wait()
                except TimeoutError:
                    yield f":\nid: {after}\n\n"  # an event without data, which only sets the id
                continue
            if events[0].number > after + 1:
                yield _text(Event(events[0].number - 1, GAP, "{}"))
            batch = events[:_MAX_BATCH]
            after = batch[-1].number
            if text := "".join([_text(event) for event in batch if await self._is_for(event, listener)]):
                yield text

    def _recent_after(self, number: int) -> list[Event]:
        return [*takewhile(lambda event: event.number > number, reversed(self._recent))][::-1]

    async def _is_for(self, event: Event, listener: Listener) -> bool:
        """Return True if a client wants an event, and the publish policy allows its path now.

        Whether a collected path was published is known only when it is recorded.
        """
        if event.name == GAP or event.name not in listener.names:
            return event.name == GAP
        if self._paths.policy is None or event.name == COLLECTED:
            return True
        return await self._paths.is_published(StorePath.in_dir(self._store_dir, json.loads(event.data)["path"]))

    async def _start(self) -> None:
        """Begin to follow the events, if this worker has had no client before."""
        async with self._starting:
            if self._following is None:
                if self._recording is not None and self._recording.done():
                    self._recording.exception()  # of an earlier attempt
                    self._recording = None
                self._store_events.continues = self.recorder.is_recording
                self.recorder.want()
                await self._look()
                if self._recording is not None:
                    await self._recording
                await self._look()
                self._following = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        """Look for events as long as this worker has clients, and for some time after that."""
        failure = ""
        while await self._is_wanted():
            await asyncio.sleep(_LOOK_INTERVAL_S if self._listeners and not failure else _IDLE_INTERVAL_S)
            try:
                await self._look()
            except Exception as error:  # noqa: BLE001 (a bug must not end the events of this worker either)
                if failure != str(error):
                    bug = None if isinstance(error, EventLogError | StoreUnavailableError) else error
                    _log.error("cannot follow events for /events: %s; trying again", error, exc_info=bug)
                failure = str(error)
            else:
                failure = ""
            self._disconnect_slow_clients(_SLOW_S)

    async def _is_wanted(self) -> bool:
        """Return True if clients may still want events. Otherwise, let another worker lead, and forget the events."""
        async with self._starting:
            if self._listeners:
                self.recorder.want()
            if self.recorder.is_recording:
                return True
            if self._recording is not None:
                await asyncio.wait([self._recording])
            self._recording = None
            self._store_events.stop()
            self._recent.clear()
            self._following = None
            return False

    async def _look(self) -> None:
        loop = asyncio.get_running_loop()
        if self._recording is None or self._recording.done():
            recording, self._recording = self._recording, None
            if recording is not None:
                recording.result()  # raises its error
            self._recording = loop.run_in_executor(self._store_thread, self._record_store_events)
        after = self._recent[-1].number if self._recent else 0
        if events := await loop.run_in_executor(self._reader, self._log.events, after):
            self._recent.extend(events)
            self._news.set()
            self._news = asyncio.Event()

    def _record_store_events(self) -> None:
        """Record the events of the store, if no other worker does. Runs in a thread of its own."""
        count = self._store_events.record()
        self.recorder.recorded += count  # not in one statement, which would overwrite what others count meanwhile

    def _disconnect_slow_clients(self, patience: float) -> None:
        for listener in list(self._listeners):
            if time.monotonic() - listener.sending_since > patience:
                self.disconnected += 1
                self._listeners.discard(listener)
                listener.abort()

    def end_streams(self) -> None:
        """End all responses, and disconnect clients that do not read. They may connect again, and continue."""
        self._disconnect_slow_clients(_LOOK_INTERVAL_S)
        self._listeners.clear()
        self._news.set()
        self._news = asyncio.Event()

    def close(self) -> None:
        """End all responses, and accept no client any more."""
        self._over = True
        self.end_streams()
        if self._following is not None:
            self._following.cancel()


def _text(event: Event) -> str:
    return f"id: {event.number}\nevent: {event.name}\ndata: {event.data}\n\n"

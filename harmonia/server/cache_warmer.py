"""Process that compresses new paths into the cache before a client asks (`warm = "new"`), newest first.

It is one more process of the supervisor, which replaces it if it ends. It has an interpreter of its own, in which all
threads that compress have the lowest priority, so that no worker waits for it.
"""

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable

from harmonia.cache.warmer import State, Warmer, lower_priority
from harmonia.errors import ConfigError, StoreUnavailableError
from harmonia.server.context import ServerContext
from harmonia.server.resources import metrics
from harmonia.store.backlog import Backlog
from harmonia.store.new_paths import DatabaseChanges
from harmonia.store.store import Store

_RETRY_S = 10.0  # after an error

_log = logging.getLogger("harmonia")


def start(context: ServerContext) -> tuple[threading.Thread, Callable[[], object]]:
    """Start the thread that warms the cache. Return it, and what to call with each heartbeat."""
    warming = _Warming(context)
    warming.start()
    return warming, warming.sample


class _Warming(threading.Thread):
    """The thread that follows the store. Ends only by an unexpected error."""

    def __init__(self, context: ServerContext) -> None:
        super().__init__(name="warm", daemon=True)
        self._context = context
        self._warmer: Warmer | None = None
        self._counts: Counter[State] = Counter()

    def run(self) -> None:
        lower_priority()  # of this thread, and of the threads that it starts
        settings = self._context.settings
        store = Store.of(settings)
        backlog = Backlog(
            store, settings.database, self._context.paths.policy, os.path.join(str(settings.cache_dir), "warmed")
        )
        changes = DatabaseChanges(settings.database)
        failure = ""
        while True:
            try:
                if self._warmer is None:
                    self._warmer = Warmer(settings, store)
                    self._warmer.compressor.on_compressed = self._context.events.compressed
                for result in self._warmer.warm(backlog.paths()):
                    self._counts[result.state] += 1
                backlog.save()
                failure = ""
            except (ConfigError, StoreUnavailableError, OSError) as error:
                if failure != str(error):
                    _log.error("cannot warm the cache: %s; trying again", error)
                failure = str(error)
                time.sleep(_RETRY_S)
            changes.wait()

    def sample(self) -> None:
        """Copy the counters into shared memory, where the workers read them."""
        if self._warmer is not None:
            metrics.sample_warmer(self._context, self._warmer.compressor, self._counts)

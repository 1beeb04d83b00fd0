"""Events of the store: paths that became valid or were collected, recorded by one worker, the leader, for all."""

import json
from collections.abc import Iterator

from harmonia.config.settings import Settings
from harmonia.process.event_log import GAP, EventLog, Leadership, encode
from harmonia.store.new_paths import Cursor
from harmonia.store.path_changes import Changes, PathChanges
from harmonia.store.publish_policy import PublishPolicy
from harmonia.store.store import Store

VALID, COLLECTED = "valid", "collected"


class StoreEvents:
    """Records the events of the store. Not thread-safe."""

    def __init__(self, settings: Settings, log: EventLog, leadership: Leadership, policy: PublishPolicy | None) -> None:
        """Open nothing yet. No other code may use `log` and `leadership`."""
        self._store_dir = settings.virtual_nix_store
        self._log = log
        self._leadership = leadership
        self._changes = PathChanges(Store.of(settings), settings.database, policy)
        self._has_begun = False
        self.continues = False
        """True if the next leader continues at the cursor of the log, False if nobody has recorded events meanwhile."""

    def record(self) -> int:
        """Record the changes since the last call, if no other worker leads. Return the number of events. Blocks.

        Raises EventLogError or StoreUnavailableError; the next call begins again.
        """
        if not self._leadership.take():
            return 0
        try:
            if not self._has_begun:
                text = self._log.cursor() if self.continues else None
                cursor = self._changes.begin(Cursor(*json.loads(text)) if text else None)
                self._log.append([(GAP, "{}")], encode(cursor))  # collected paths may be missing
                self._has_begun = self.continues = True
            if (changes := self._changes.poll()) is None:
                return 0
            events = [*self._events_of(changes)]
            self._log.append(events, encode(changes.cursor))
        except BaseException:
            self._has_begun = False
            raise
        return len(events)

    def stop(self) -> None:
        """Let another worker lead."""
        self._has_begun = False
        self._leadership.release()

    def _events_of(self, changes: Changes) -> Iterator[tuple[str, str]]:
        for path in changes.collected:
            yield COLLECTED, encode({"path": f"{self._store_dir}/{path}"})
        for path, nar_size, _ in changes.valid:
            yield VALID, encode({"path": f"{self._store_dir}/{path}", "narSize": nar_size})

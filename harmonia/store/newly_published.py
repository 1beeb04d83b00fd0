"""New store paths that the publish policy allows: at once, or as soon as they are signed or a GC root needs them."""

import time
from collections import deque
from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar

from harmonia.nix.store_path import StorePath
from harmonia.store.publish_policy import PublishPolicy
from harmonia.store.store import Store

_MAX_WAITING = 4096
_PATIENCE_S = 600.0  # for which an unpublished path is looked at again
_INTERVAL_S = 2.0  # between two looks


class HasPath(Protocol):
    @property
    def path(self) -> StorePath: ...


_P = TypeVar("_P", bound=HasPath)


class NewlyPublished(Generic[_P]):
    """Filter of new paths. Not thread-safe, like the store. The methods raise StoreUnavailableError."""

    def __init__(self, store: Store, policy: PublishPolicy | None) -> None:
        self._store = store
        self._policy = policy
        self._waiting: deque[tuple[float, _P]] = deque(maxlen=_MAX_WAITING)
        self._next_look = 0.0

    @property
    def is_due(self) -> bool:
        """Return True if earlier paths should be looked at again."""
        return bool(self._waiting) and time.monotonic() >= self._next_look

    def select(self, new: Iterable[_P]) -> list[_P]:
        """Return earlier paths that are published by now, and the published ones of the new paths.

        After an error, the earlier paths are looked at again.
        """
        if self._policy is None:
            return list(new)
        is_published = self._policy.published_filter(self._store)
        now = time.monotonic()
        candidates = [(now + _PATIENCE_S, each) for each in new]
        is_due = self.is_due
        if is_due:
            candidates = [each for each in self._waiting if each[0] > now] + candidates
        published = [each for each in candidates if is_published(each[1].path)]
        if is_due:
            self._waiting.clear()
            self._next_look = now + _INTERVAL_S
        if not self._policy.by_name_alone:
            self._waiting.extend(each for each in candidates if each not in published)
        return [each for _, each in published]

    def forget(self) -> None:
        """Forget earlier paths, because the database was replaced."""
        self._waiting.clear()

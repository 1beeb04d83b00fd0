"""Target of uploads: another binary cache, in the layout that Nix reads, whatever protocol writes to it."""

from collections.abc import AsyncIterator, Collection
from typing import Protocol

from harmonia.errors import HarmoniaError
from harmonia.nix.store_path import StorePath


class TargetError(HarmoniaError):
    """The base class of errors of a target. The message is one line with the cause."""


class TargetUnavailableError(TargetError):
    """The target does not answer, or reports a fault of its own. The same upload may succeed later.

    `retry_after` is the seconds that the target asked to wait, or 0.
    """

    def __init__(self, message: str, retry_after: float = 0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TargetChangedError(TargetUnavailableError):
    """The target has lost paths since `missing` was asked, by a garbage collection of its own."""


class TargetRefusedError(TargetError):
    """The target does not accept an object, for example because of its size, a signature, or a missing permission."""


class Body(Protocol):
    """A file of a NAR to upload, in memory or on disk."""

    size: int
    """The length of the file in bytes."""

    def chunks(self) -> AsyncIterator[bytes]:
        """Return the content in chunks. May be called again, for another attempt."""


class Target(Protocol):
    """A binary cache to upload to. All methods may run concurrently, on one event loop.

    Objects never change, so each may be written again. All methods raise TargetUnavailableError after some attempts, or
    TargetRefusedError.
    """

    name: str
    """The target in messages, without credentials."""

    async def check(self) -> None:
        """Return if the target can take uploads. Creates an empty binary cache if there is none."""

    async def missing(self, paths: Collection[StorePath]) -> set[StorePath]:
        """Return those of the paths whose narinfo the target does not have."""

    async def keep(self, paths: Collection[StorePath]) -> set[StorePath]:
        """Protect paths that the target has from its next garbage collections. Return those that it still has."""

    async def put_nar(self, url: str, body: Body) -> bool:
        """Write the file of a NAR, whose URL is relative to the cache. Return False if the target had it."""

    async def put_narinfo(self, path: StorePath, text: str) -> None:
        """Write the narinfo of a path. The caller has written its NAR and the narinfos of its references before."""

    async def close(self) -> None:
        """Close all connections."""

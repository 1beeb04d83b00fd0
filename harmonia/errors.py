"""Exceptions of Harmonia. `server/error_response.py` maps each of them to an HTTP status.

Only subclasses of HarmoniaError are raised, never HarmoniaError itself.
"""

import errno

SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN}
"""Error numbers of an OSError that mean that the machine is short of descriptors, memory or tasks.

The file that was being opened or read is not at fault.
"""


class HarmoniaError(Exception):
    """The base class of all errors that Harmonia raises on purpose."""


class ConfigError(HarmoniaError):
    """A setting cannot work. The message is one line with the file, the key and the remedy."""


class FormatError(HarmoniaError):
    """Text or bytes violate their format, for example that of a store path, a key, a base-32 digest or a NAR."""


class StoreUnavailableError(HarmoniaError):
    """The store's database cannot be read now, because it is busy or missing."""


class StoreObjectError(HarmoniaError):
    """A store object on disk differs from its record in the database."""


class CacheFileError(HarmoniaError):
    """A file of our own cache is damaged. It is removed at once; the next request remakes it."""


class EventLogError(HarmoniaError):
    """The log of events cannot be read or written, because its directory or its disk fails."""


class InvalidPathError(HarmoniaError):
    """A path that must be a valid path of the store is not valid."""


class RemoteError(HarmoniaError):
    """A remote server is unreachable, or its response is wrong."""


class DaemonError(RemoteError):
    """The Nix daemon reports an error. The message may contain colour codes."""


class RequestRefusedError(HarmoniaError):
    """A request is refused. The message is one line, with the reason and its remedy; the client sees it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class PushRefusedError(RequestRefusedError):
    """A push is refused. The status is never 5xx: Nix up to 2.32 repeats such a request with an empty body."""


class UpstreamError(HarmoniaError):
    """An upstream cache does not respond, or its response is wrong."""

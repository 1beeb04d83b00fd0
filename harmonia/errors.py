"""Errors in the words of the domain. None of them knows HTTP: `server/http/error_response.py` gives each its status.

The base is never raised itself: an operator or a client is always told which of the leaves it was.
"""

import errno

SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN}
"""Of descriptors, memory or tasks: what an OSError says of the machine as it is just now, not of the file."""


class HarmoniaError(Exception):
    """Whatever Harmonia raises on purpose."""


class ConfigError(HarmoniaError):
    """A setting that cannot work. The message is one line that names the file, the key and the remedy."""


class FormatError(HarmoniaError):
    """Text or bytes that are not what their format says: a store path, a key, a base-32 digest, a NAR."""


class StoreUnavailableError(HarmoniaError):
    """The store's database is busy or gone: nothing can be said about any path just now."""


class StoreObjectError(HarmoniaError):
    """What is on disk is not what the database says of it."""


class CacheFileError(HarmoniaError):
    """A file of our own cache is damaged. It is removed when that is found, so the next request has it made anew."""


class InvalidPathError(HarmoniaError):
    """What should be a valid path of the store, and is none."""


class RemoteError(HarmoniaError):
    """A server that cannot be reached, or answers what it should not."""


class UpstreamError(HarmoniaError):
    """Another cache does not answer, or not with what it should."""

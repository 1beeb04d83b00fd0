"""Cache outcome of a request: where the body of its response came from."""

from enum import IntEnum


class Outcome(IntEnum):
    """A value of the label `outcome` in the metrics and of the field in the access log: its name in lower case."""

    NONE = 0
    """Nowhere: an error, 304, a redirect, an answer to HEAD of a NAR or to an upload, or a page."""
    MEMORY = 1
    """The response, or its text, was in memory."""
    DISK = 2
    """A complete file was in `cache_dir`."""
    COMPRESSED = 3
    """A NAR was compressed now, for this request or for another one at the same time."""
    STORE = 4
    """The store was read: its database or its files."""
    UPSTREAM = 5
    """An upstream sent it now."""

    def __str__(self) -> str:
        return self.name.lower()

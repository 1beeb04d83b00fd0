"""Logging to stderr, one line for each event."""

import logging
import os
import sys
from contextlib import suppress

from harmonia.config.settings import Settings

_MAX_LINE_CHARS = 16 << 10  # more than a traceback needs
_PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}


class _LineFormatter(logging.Formatter):
    """Formatter that makes one line of each event.

    For the journal, a line has no time and starts with its priority (sd-daemon(3)).
    """

    def __init__(self, *, journal: bool) -> None:
        super().__init__("%(levelname)s %(message)s" if journal else "%(asctime)s %(levelname)s %(message)s")
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record).replace("\n", " | ")
        if len(line) > _MAX_LINE_CHARS:
            line = f"{line[:_MAX_LINE_CHARS]}… ({len(line)} characters)"
        if not line.isprintable():  # text from clients must not forge log lines or control the terminal
            line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
        return f"<{_PRIORITIES[record.levelno]}>{line}" if self._journal else line


def to_stderr(settings: Settings | None = None) -> None:
    """Configure logging by `settings`, or with the level `info` if `settings` is None."""
    handler = logging.StreamHandler()
    handler.setFormatter(_LineFormatter(journal=_is_journal()))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("harmonia").setLevel((settings.log_level if settings else "info").upper())
    logging.getLogger("harmonia.access").setLevel(
        logging.INFO if settings and settings.access_log else logging.CRITICAL
    )
    # Sanic logs each disconnect of a client, and each error that we have already logged.
    for name in ("sanic.root", "sanic.error", "sanic.server"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _is_journal() -> bool:
    """Return True if systemd has connected stderr to its journal (systemd.exec(5)).

    The variable alone does not show it, because a program in a terminal may inherit it.
    """
    with suppress(OSError):
        status = os.fstat(sys.stderr.fileno())
        return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
    return False

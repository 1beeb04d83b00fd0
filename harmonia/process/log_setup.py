"""Logging to stderr, one line for each event, as text or as JSON."""

import json
import logging
import os
import sys
from contextlib import suppress
from datetime import datetime

from harmonia.config.settings import Settings

_MAX_LINE_CHARS = 16 << 10  # more than a traceback needs
_PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}


class _LineFormatter(logging.Formatter):
    """Formatter that makes one line of each event: its time in the form of ISO 8601, its level and its message.

    For the journal, a line has no time and starts with its priority (sd-daemon(3)).
    """

    def __init__(self, *, journal: bool) -> None:
        super().__init__("%(levelname)s %(message)s" if journal else "%(asctime)s %(levelname)s %(message)s")
        self._journal = journal

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: ARG002, N802 (logging's)
        return _iso_time(record)

    def format(self, record: logging.LogRecord) -> str:
        line = _cut(super().format(record).replace("\n", " | "))
        if not line.isprintable():  # text from clients must not forge log lines or control the terminal
            line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
        return f"<{_PRIORITIES[record.levelno]}>{line}" if self._journal else line


class _JsonFormatter(logging.Formatter):
    """Formatter that makes one JSON object of each event, with the `fields` of the event if it has some.

    All characters are ASCII. For the journal, the line starts with its priority.
    """

    def __init__(self, *, journal: bool) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        event = {"time": _iso_time(record), "level": record.levelname.lower(), "logger": record.name}
        fields = getattr(record, "fields", None)
        event |= {"message": _cut(super().format(record))} if fields is None else fields
        if (request_id := getattr(record, "request_id", None)) is not None:
            event["request_id"] = request_id
        line = json.dumps({name: _valid(value) if isinstance(value, str) else value for name, value in event.items()})
        return f"<{_PRIORITIES[record.levelno]}>{line}" if self._journal else line


def _iso_time(record: logging.LogRecord) -> str:
    """Return the local time of an event with its UTC offset, like 2026-11-29T17:32:25.123+01:00."""
    return datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")


def _valid(text: str) -> str:
    """Return the text with each byte that is not UTF-8 escaped: some parsers reject JSON with lone surrogates."""
    return text.encode(errors="backslashreplace").decode()


def _cut(line: str) -> str:
    return f"{line[:_MAX_LINE_CHARS]}… ({len(line)} characters)" if len(line) > _MAX_LINE_CHARS else line


def to_stderr(settings: Settings | None = None) -> None:
    """Configure logging by `settings`, or as text with the level `info` if `settings` is None."""
    handler = logging.StreamHandler()
    formatter = _JsonFormatter if settings and settings.log_format == "json" else _LineFormatter
    handler.setFormatter(formatter(journal=_is_journal()))
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

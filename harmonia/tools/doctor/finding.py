"""Findings of the doctor: check, level, description and remedy."""

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

Level = Literal["ok", "skipped", "warning", "error"]


class Finding(NamedTuple):
    check: str
    level: Level
    what: str
    remedy: str = ""
    """Steps that fix a warning or an error. Empty for other levels."""


Findings = Iterator[Finding]

LOG = "check the server's log"
# Checks whose result depends on the server, not on the path.
_SERVER_CHECKS = ("HEAD", "caching", "ranges", "resume", "compression")


def once(findings: Iterable[Finding]) -> Findings:
    """Yield the findings. A problem of the server as a whole is yielded only for the first path that shows it."""
    seen = set()
    for finding in findings:
        cause = (finding.check, finding.remedy)
        if finding.check in _SERVER_CHECKS and finding.remedy:
            if cause in seen:
                continue
            seen.add(cause)
        yield finding

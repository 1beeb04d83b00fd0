"""What is found, in the words that people and programs get."""

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

Level = Literal["ok", "skipped", "warning", "error"]


class Finding(NamedTuple):
    check: str
    level: Level
    what: str
    remedy: str = ""
    """What to do about a warning or an error."""


Findings = Iterator[Finding]

LOG = "look at the server's log"
# What is so because the server is as it is, and not for one path.
_MANNERS = ("HEAD", "caching", "ranges", "resume", "compression")


def once(findings: Iterable[Finding]) -> Findings:
    """The findings, without those that tell of the server, by another path, what one before them told."""
    told = set()
    for finding in findings:
        cause = (finding.check, finding.remedy)
        if finding.check in _MANNERS and finding.remedy:
            if cause in told:
                continue
            told.add(cause)
        yield finding

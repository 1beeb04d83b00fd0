"""What is found, in the words that people and programs get."""

from collections.abc import Iterator
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

"""Which Harmonias have seen a question: caches that are each other's upstreams do not send it round in circles.

Each has a name, new at each start, which it tells who asks it (`Harmonia-Id`). A question carries the names of those it
came through (`Harmonia-Hops`), and of those that were asked beside (`Harmonia-Asked`).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

HOPS, ASKED, IDENTITY = "Harmonia-Hops", "Harmonia-Asked", "Harmonia-Id"

_MOST_HOPS = 8
_MOST_ASKED = 64
_LONGEST_NAME = 32
_NAME = re.compile(r"[0-9A-Za-z_-]+")  # what goes on to others, in a header, whoever said it


@dataclass(frozen=True, slots=True)
class Hops:
    """Through which Harmonias a question came, and whom else they have asked.

    Those asked are not asked again: among n caches that all know each other, a question would come by each way through
    them, of which there are n!.
    """

    through: tuple[str, ...] = ()
    asked: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, through: str, asked: str) -> Self:
        """What the two headers tell, of which no more is believed, or remembered, than Harmonias would send."""
        return cls(tuple(names(through, _MOST_HOPS)), frozenset(names(asked, _MOST_ASKED)))

    def is_over(self, identity: str) -> bool:
        """Whether a question has been here already, or almost everywhere else."""
        return identity in self.through or len(self.through) >= _MOST_HOPS

    def headers(self, identity: str, asked: Iterable[str | None]) -> dict[str, str]:
        """What to send on, to those `asked`."""
        told = self.asked.union(filter(None, asked))
        return {HOPS: ", ".join((*self.through, identity)), ASKED: ", ".join(sorted(told))}


def names(header: str, most: int = 1) -> list[str]:
    """The names in a header, as far as they are such."""
    parts = (part.strip()[:_LONGEST_NAME] for part in header.split(","))
    return [name for name in parts if _NAME.fullmatch(name)][:most]

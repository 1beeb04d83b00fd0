"""Loop guard: caches that are each other's upstreams send no question round in circles (Via, RFC 9110 section 7.6.3).

Each Harmonia has a pseudonym, new at each start. A question carries the pseudonyms of those it came through. The last
of them names in its comment all that were asked beside, which saves requests; a proxy may remove the comment. An answer
to a question with Via carries the pseudonym of the server that gives it.
"""

import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

VIA = "Via"
PROBE = {VIA: "1.1 harmonia"}
"""Headers of a question that comes from no client: they only ask for the pseudonym of the upstream."""

_MAX_HOPS = 8
_MAX_ASKED = 64
_MAX_CHARS = 4096  # of a field: more than 8 hops and 64 pseudonyms take

_PSEUDONYM = re.compile(r"harmonia-[0-9a-f]{16}")
_ELEMENT = re.compile(r"(?:^|,)[ \t]*[^\s,]+[ \t]+(harmonia-[0-9a-f]{16})[ \t]*(?=,|$)")
_COMMENT = re.compile(r"\(([^()]*)\)")


def new_pseudonym() -> str:
    return f"harmonia-{secrets.token_hex(8)}"


@dataclass(frozen=True, slots=True)
class Via:
    """The Harmonias that a question came through, and those that they have asked beside.

    Those asked are not asked again: among n caches that all know each other, a question would come by each way through
    them, of which there are n!. Other proxies are left out: their names may be nobody's business.
    """

    through: tuple[str, ...] = ()
    asked: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, field: str) -> Self:
        """Return what a field holds, bounded: anybody may have sent it."""
        field = field[:_MAX_CHARS]
        asked = _PSEUDONYM.findall(" ".join(_COMMENT.findall(field)))
        through = _ELEMENT.findall(_COMMENT.sub("", field))
        return cls(tuple(through[:_MAX_HOPS]), frozenset(asked[:_MAX_ASKED]))

    def is_loop(self, identity: str) -> bool:
        """Return whether a question has been here already, or almost everywhere else."""
        return identity in self.through or len(self.through) >= _MAX_HOPS

    def headers(self, identity: str, asked: Iterable[str | None] = ()) -> dict[str, str]:
        """Return what to send on, to those `asked`."""
        names = sorted(self.asked.union(filter(None, asked)))[:_MAX_ASKED]
        comment = f" (asked {' '.join(names)})" if names else ""
        return {VIA: ", ".join(f"1.1 {name}" for name in (*self.through, identity)) + comment}

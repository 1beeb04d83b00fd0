"""Loop guard: caches that are each other's upstreams do not forward a request in circles (Via, RFC 9110 section 7.6.3).

Each Harmonia has a pseudonym, new at each start. A request carries the pseudonyms of the Harmonias that it came
through. A comment after the last one lists the other Harmonias that were asked, which saves requests; a proxy may
remove the comment. The response to a request with Via carries the pseudonym of the server that sends it.
"""

import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

VIA = "Via"
PROBE = {VIA: "1.1 harmonia"}
"""Headers of a request that is not made for a client. They make the upstream send its pseudonym."""

_MAX_HOPS = 8
_MAX_ASKED = 64
_MAX_CHARS = 4096  # of a field: enough for 8 hops and 64 pseudonyms

_PSEUDONYM = re.compile(r"harmonia-[0-9a-f]{16}")
_ELEMENT = re.compile(r"(?:^|,)[ \t]*[^\s,]+[ \t]+(harmonia-[0-9a-f]{16})[ \t]*(?=,|$)")
_COMMENT = re.compile(r"\(([^()]*)\)")


def new_pseudonym() -> str:
    return f"harmonia-{secrets.token_hex(8)}"


@dataclass(frozen=True, slots=True)
class Via:
    """The Harmonias that a request came `through`, and the others that were `asked` for the same resource.

    A Harmonia in `asked` is not asked again. Otherwise, among n caches that are all upstreams of each other, a request
    would take each of the n! ways through them. Other proxies are not forwarded, because their names may be private.
    """

    through: tuple[str, ...] = ()
    asked: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, field: str) -> Self:
        """Parse the value of Via, up to fixed limits, because any client can send it."""
        field = field[:_MAX_CHARS]
        asked = _PSEUDONYM.findall(" ".join(_COMMENT.findall(field)))
        through = _ELEMENT.findall(_COMMENT.sub("", field))
        return cls(tuple(through[:_MAX_HOPS]), frozenset(asked[:_MAX_ASKED]))

    def is_loop(self, identity: str) -> bool:
        """Return True if a request came through the server `identity` before, or through _MAX_HOPS Harmonias."""
        return identity in self.through or len(self.through) >= _MAX_HOPS

    def headers(self, identity: str, asked: Iterable[str | None] = ()) -> dict[str, str]:
        """Return the header for a request that the server `identity` forwards to the servers `asked`."""
        names = sorted(self.asked.union(filter(None, asked)))[:_MAX_ASKED]
        comment = f" (asked {' '.join(names)})" if names else ""
        return {VIA: ", ".join(f"1.1 {name}" for name in (*self.through, identity)) + comment}

"""What a client prefers: RFC 9110 section 12.5. We offer zstd and identity, and errors as a page or as plain text."""

import re

from sanic.exceptions import SanicException

_ELEMENT = re.compile(r"([!#$%&'*+.^_`|~0-9a-z/-]+)(?:[ \t]*;[ \t]*q=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?))?")
"""A coding or a media type and its weight, in lower case."""


class NotAcceptable(SanicException):
    """Nothing that we have is wanted."""

    status_code = 406


def weights(header: str) -> dict[str, float]:
    """The weight of each that is named, in lower case. What is malformed is as if it were not there."""
    matches = (_ELEMENT.fullmatch(element.strip(" \t").lower()) for element in header.split(","))
    return {match[1]: float(match[2] or 1) for match in matches if match}


def prefers_zstd(header: str, *, worthwhile: bool = True) -> bool:
    """Whether to send zstd rather than the bytes as they are. NotAcceptable where neither is wanted.

    It is not `worthwhile` where a body is tiny or cannot be compressed: then only who refuses identity gets it.
    """
    wanted = weights(header)
    others = wanted.get("*")
    zstd = wanted.get("zstd", others or 0.0)
    identity = wanted.get("identity", others)
    if identity == 0:
        if zstd == 0:
            raise NotAcceptable
        return True
    # Nobody who names zstd wants the plain bytes as much, whatever weight they have by default.
    return worthwhile and zstd > 0 and (identity is None or zstd >= identity)


def prefers_html(header: str) -> bool:
    """Whether who sends that Accept would rather have a page than plain text: browsers do, where people look."""
    wanted = weights(header)
    others = wanted.get("text/*", wanted.get("*/*", 0.0))
    return wanted.get("text/html", others) > wanted.get("text/plain", others)

"""Content negotiation (RFC 9110 section 12.5): zstd or identity for bodies, HTML or plain text for errors."""

import re

from sanic.exceptions import SanicException

_ELEMENT = re.compile(r"([!#$%&'*+.^_`|~0-9a-z/-]+)(?:[ \t]*;[ \t]*q=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?))?")
"""A coding or a media type and its weight, in lower case."""


class NotAcceptable(SanicException):
    """406: the client accepts none of our content codings."""

    status_code = 406


def weights(header: str) -> dict[str, float]:
    """Return the weight of each element in an Accept or Accept-Encoding header, in lower case. Skip malformed ones."""
    matches = (_ELEMENT.fullmatch(element.strip(" \t").lower()) for element in header.split(","))
    return {match[1]: float(match[2] or 1) for match in matches if match}


def prefers_zstd(header: str, *, worthwhile: bool = True) -> bool:
    """Return True if the response should be zstd. Raises NotAcceptable if the client accepts neither zstd nor identity.

    `worthwhile` is False for tiny or incompressible bodies: then only a client that refuses identity gets zstd.
    """
    wanted = weights(header)
    others = wanted.get("*")
    zstd = wanted.get("zstd", others or 0.0)
    identity = wanted.get("identity", others)
    if identity == 0:
        if zstd == 0:
            raise NotAcceptable
        return True
    # If only zstd is named, zstd is preferred: the default weight of identity does not count.
    return worthwhile and zstd > 0 and (identity is None or zstd >= identity)


def prefers_html(header: str) -> bool:
    """Return True if an Accept header prefers HTML to plain text, as browsers do for pages."""
    wanted = weights(header)
    others = wanted.get("text/*", wanted.get("*/*", 0.0))
    return wanted.get("text/html", others) > wanted.get("text/plain", others)


def accepts(header: str, media_type: str) -> bool:
    """Return True if an Accept header allows a media type. Without the header, every type is allowed."""
    wanted = weights(header)
    names = (media_type, f"{media_type.partition('/')[0]}/*", "*/*")
    return not header or next((wanted[name] for name in names if name in wanted), 0.0) > 0

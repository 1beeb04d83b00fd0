"""Rules for redirects of an upstream: never from https to http, and to other hosts only for NARs that are verified."""

from contextlib import suppress
from urllib.parse import urljoin

from yarl import URL

from harmonia.untrusted import excerpt
from harmonia.upstream.refusals import Reason

_HTTPS_PORT = 443


class RedirectError(Exception):
    """A redirect is malformed or not allowed."""

    def __init__(self, reason: Reason, why: str) -> None:
        super().__init__(why)
        self.reason = reason


def target(url: str, location: str, base: str | None) -> str:
    """Return the URL to which a response from `url` redirects with the header Location.

    Raises RedirectError if it is malformed, if it leads from https to http, or if it leaves the site of `base`, unless
    that is None.
    """
    try:
        joined = urljoin(url, location)
        parts = URL(joined, encoded=True)
        is_http = parts.scheme in {"http", "https"} and bool(parts.host)
    except ValueError:
        is_http = False
    if not is_http:
        raise RedirectError(Reason.REDIRECT_MALFORMED, f"malformed redirect to {excerpt(location)}")
    if url.startswith("https:") and parts.scheme == "http":
        raise RedirectError(Reason.REDIRECT_TO_HTTP, f"redirect from https to {origin(parts)}")
    if base is not None and not is_same_site(base, joined):
        raise RedirectError(Reason.REDIRECT_ELSEWHERE, f"redirect to another host, {origin(parts)}")
    return joined


def is_same_site(base: str, url: str) -> bool:
    """Return True if a URL has the scheme, host and port of the upstream at `base`.

    If `base` is http, https on the same host counts, too, with the same port or 443: sites redirect that way.
    """
    with suppress(ValueError):
        ours, other = URL(base), URL(url, encoded=True)
        if (ours.scheme, ours.host, ours.port) == (other.scheme, other.host, other.port):
            return True
        is_upgrade = (ours.scheme, other.scheme) == ("http", "https")
        return is_upgrade and ours.host == other.host and other.port in {ours.port, _HTTPS_PORT}
    return False


def origin(url: URL) -> str:
    """Return scheme, host and port of a URL, for the log. The rest may be secret, as in the signed URLs of S3."""
    return excerpt(f"{url.scheme}://{url.host}:{url.port}")

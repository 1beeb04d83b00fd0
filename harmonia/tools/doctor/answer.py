"""Checks that apply to every response: HEAD matches GET, caching headers, conditional requests."""

from harmonia.tools.doctor.finding import Finding, Findings
from harmonia.tools.http_client import Answer, Client
from harmonia.untrusted import integer

_NOT_MODIFIED = 304
_MAX_AGE_S = 1 << 31  # larger values mean the same (RFC 9111 section 1.2.2)
_COMPARED = ("content-type", "content-length", "content-encoding", "etag", "cache-control", "last-modified", "vary")


def head(client: Client, path: str) -> Findings:
    """Check that HEAD returns the status and headers of GET. Nix uses HEAD to test if a path exists."""
    answer, by_head = client.get(path, stop=0), client.get(path, method="HEAD")
    if answer.status != by_head.status:
        what = f"HEAD of {path} returns {by_head.status}, but GET {answer.status}"
        yield Finding(
            "HEAD", "error", what, "answer HEAD like GET, without the body: Nix uses HEAD to test if a path exists"
        )
        return
    different = [name for name in _COMPARED if answer.headers.get(name) != by_head.headers.get(name)]
    # If only one of them has a length, it became known between the two requests.
    if "content-length" in different and "content-length" not in answer.headers.keys() & by_head.headers:
        different.remove("content-length")
    if different:
        what = f"HEAD and GET of {path} differ in {', '.join(different)}"
        yield Finding("HEAD", "warning", what, "send the same headers to both")
    else:
        yield Finding("HEAD", "ok", f"HEAD and GET of {path} match")


def caching(client: Client, path: str, answer: Answer, least: int) -> Findings:
    """Check Cache-Control, ETag and Last-Modified. `least` is the shortest acceptable max-age in seconds."""
    control = answer.headers.get("cache-control")
    unwanted, wanted, keepers = ["no-store", "no-cache", "private"], "public", "proxies and CDNs"
    if client.has_credentials:  # a private response must not be stored by shared caches
        unwanted, wanted, keepers = ["no-store", "no-cache"], "private", "clients"
    wanted += ", max-age=31536000, immutable" if least else ", max-age=86400"
    if control is None or any(word in control for word in unwanted):
        what = f"{path}: {'no Cache-Control' if control is None else f'Cache-Control: {control}'}"
        yield Finding("caching", "warning", what, f"send `Cache-Control: {wanted}`, so that {keepers} can cache it")
    elif max_age(answer) < least:
        remedy = f"a NAR never changes under its name: send `Cache-Control: {wanted}`"
        yield Finding("caching", "warning", f"{path} may be cached for {max_age(answer)} s only", remedy)
    else:
        yield Finding("caching", "ok", f"{path}: Cache-Control: {control}")
    etag = answer.headers.get("etag")
    if etag is None and "last-modified" not in answer.headers:
        yield Finding(
            "caching",
            "warning",
            f"{path}: neither ETag nor Last-Modified",
            "send an ETag, so that clients can revalidate without a new download",
        )
    elif etag is not None:
        again = client.get(path, {"If-None-Match": etag}, stop=0)
        if again.status != _NOT_MODIFIED:
            what = f"{path}: If-None-Match with its own ETag returns {again.status} instead of 304"
            yield Finding("caching", "warning", what, "answer 304, or send no ETag")


def max_age(answer: Answer) -> int:
    """Return the max-age of the response in seconds, or 0 if it has none."""
    words = [word.strip().partition("=") for word in answer.headers.get("cache-control", "").split(",")]
    return max((integer(value, _MAX_AGE_S) or 0 for name, _, value in words if name == "max-age"), default=0)

"""Table of routes: one row for each resource, with all rules that depend only on the resource."""

from collections.abc import Callable
from dataclasses import dataclass

from harmonia.config.tokens import Scope
from harmonia.metrics.outcome import Outcome
from harmonia.nix.base32 import ALPHABET
from harmonia.server.context import Fallback
from harmonia.server.http.response import Handler, Representation
from harmonia.server.http.response_cache import AbsentError
from harmonia.server.resources import (
    browse,
    build_log,
    build_trace,
    bulk_narinfo,
    cache_info,
    closure,
    debuginfo,
    diff,
    events,
    explain,
    files,
    health,
    landing,
    listing,
    metrics,
    nar,
    narinfo,
    push,
    sbom,
    site_files,
)

BULK_URI = "/get-narinfos-v1"


def _hash_part(parameter: str) -> str:
    """Return the pattern of a hash part, for the parameter with this name."""
    return f"(?P<{parameter}>[{ALPHABET}]{{32}})"


_HASH_PART = _hash_part("hash_part")


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A resource: its URI, its handler, and its rules."""

    uri: str
    """Sanic's pattern."""
    handler: Handler
    metric: str
    """Value of the label `route` in the metrics."""
    methods: tuple[str, ...] = ("GET", "HEAD")
    """Methods of the handler. With POST, it reads the body itself, without a limit."""
    scope: Scope | None = "read"
    """Scope that a token needs, or None if the resource never needs a token."""
    rate_limited: bool = False
    """True if `max_query_rate` applies. Only for resources that can be expensive and that Nix never requests: after a
    429, Nix 2.29 to 2.34 waits a minute.
    """
    put: Handler | None = None
    """Handles uploads with PUT. It reads the body itself, without a limit."""
    outcome: Outcome = Outcome.NONE
    """Outcome of a response for which the handler notes none."""
    fallback: Callable[[Fallback], Handler] | None = None
    """Selects the handler for upstreams, which answers if the local store does not have the resource."""


async def _absent(*_: object, **__: str) -> Representation:
    """Raise AbsentError, because only upstreams have the resource."""
    raise AbsentError


ROUTES = (
    Route(uri="/", handler=landing.get, metric="landing"),
    Route(uri="/nix-cache-info", handler=cache_info.get, metric="cache_info"),
    Route(
        uri=rf"/<hash_part:{_HASH_PART}\.narinfo>",
        handler=narinfo.get,
        metric="narinfo",
        fallback=lambda upstreams: upstreams.get_narinfo,
    ),
    Route(uri=BULK_URI, handler=bulk_narinfo.post, metric="get_narinfos", methods=("POST",), outcome=Outcome.STORE),
    Route(
        uri=rf"/<hash_part:{_HASH_PART}\.ls>",
        handler=listing.get,
        metric="listing",
        fallback=lambda upstreams: upstreams.get_listing,
    ),
    Route(uri=rf"/<hash_part:{_HASH_PART}\.closure>", handler=closure.get, metric="closure", outcome=Outcome.STORE),
    Route(uri="/nar/<name:str>", handler=nar.get, metric="nar"),
    Route(
        uri="/upstream/<name:path>",
        handler=_absent,
        metric="upstream",
        fallback=lambda upstreams: upstreams.get_nar,
    ),
    Route(uri="/log/<name:str>", handler=build_log.get, metric="log", outcome=Outcome.STORE),
    Route(
        uri="/realisations/<name:str>",
        handler=build_trace.get_realisation,
        metric="realisation",
        outcome=Outcome.STORE,
        fallback=lambda upstreams: upstreams.get_realisation,
    ),
    Route(
        uri="/build-trace-v2/<derivation:str>/<name:str>",
        handler=build_trace.get,
        metric="build_trace",
        outcome=Outcome.STORE,
        fallback=lambda upstreams: upstreams.get_build_trace,
    ),
    Route(
        uri="/debuginfo/<name:str>",
        handler=debuginfo.get,
        metric="debuginfo",
        rate_limited=True,
        outcome=Outcome.STORE,
        fallback=lambda upstreams: upstreams.get_debuginfo,
    ),
    Route(uri="/serve/<where:path>", handler=files.get, metric="serve", outcome=Outcome.STORE),
    Route(uri="/search", handler=browse.search, metric="search", scope="browse", rate_limited=True),
    Route(uri=f"/path/<hash_part:{_HASH_PART}>", handler=browse.path, metric="path", scope="browse", rate_limited=True),
    Route(
        uri=rf"/diff/<before:{_hash_part('before')}>/<after:{_hash_part('after')}>",
        handler=diff.get,
        metric="diff",
        scope="browse",
        rate_limited=True,
    ),
    Route(uri=f"/sbom/<hash_part:{_HASH_PART}>", handler=sbom.get, metric="sbom", scope="browse", rate_limited=True),
    Route(
        uri=f"/explain/<hash_part:{_HASH_PART}>",
        handler=explain.get,
        metric="explain",
        scope="browse",
        rate_limited=True,
    ),
    Route(uri="/events", handler=events.get, metric="events", scope="browse", rate_limited=True),
    Route(uri="/robots.txt", handler=site_files.get_robots, metric="robots", scope=None),
    Route(uri="/favicon.ico", handler=site_files.get_icon, metric="favicon", scope=None),
    Route(uri="/version", handler=health.get_version, metric="version", scope=None),
    Route(uri="/health", handler=health.get, metric="health", scope=None),
)
METRICS_ROUTES = (Route(uri="/metrics", handler=metrics.get, metric="metrics", scope="metrics"),)
"""Served with the other routes, or alone at `metrics_bind`."""
PUSH_ROUTES = (
    *(
        Route(uri=f"/push{uri}", handler=get, put=put, metric=f"push_{metric}", scope="push")
        for uri, metric, get, put in (
            ("/nix-cache-info", "cache_info", cache_info.get_for_push, push.drop),
            (rf"/<hash_part:{_HASH_PART}\.narinfo>", "narinfo", push.get_narinfo, push.put_narinfo),
            (rf"/<hash_part:{_HASH_PART}\.ls>", "listing", push.for_readers(listing.get), push.drop),
            ("/nar/<name:str>", "nar", push.for_readers(push.get_nar), push.put_nar),
            ("/log/<name:str>", "log", push.for_readers(build_log.get_local), push.put_log),
            ("/realisations/<name:str>", "realisation", build_trace.get_realisation, push.put_realisation),
            ("/build-trace-v2/<derivation:str>/<name:str>", "build_trace", build_trace.get, push.drop),
            ("/debuginfo/<name:str>", "debuginfo", debuginfo.get, push.drop),
        )
    ),
    Route(
        uri=f"/push{BULK_URI}",
        handler=bulk_narinfo.post_valid,
        metric="push_get_narinfos",
        methods=("POST",),
        scope="push",
    ),
)
"""The store URL for uploads. Only the local store answers there, never an upstream."""

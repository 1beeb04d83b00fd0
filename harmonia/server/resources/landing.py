"""`/`: page for people with the URL, the public keys, and the settings for Nix clients."""

import math
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from typing import TypeVar

from html5tagger import Builder, E
from sanic import Request
from sanic.exceptions import NotFound

from harmonia.errors import StoreUnavailableError
from harmonia.server import page
from harmonia.server.context import ServerContext
from harmonia.server.http import origin
from harmonia.server.http.response import Representation
from harmonia.store import queries
from harmonia.store.queries import ListedPath
from harmonia.store.store import Store

_DESCRIPTION = "Add this cache to Nix to download builds instead of compiling them."
_FACT_MAX_AGE_S = 10

_T = TypeVar("_T")


async def get(context: ServerContext, request: Request) -> Representation:
    settings = context.settings
    if not settings.landing or request.path != "/":
        raise NotFound
    url = origin.base_url(request, settings)
    keys = context.trusted_keys
    facts = await _facts(context, request)
    document = page.begin(context, request, "", "./")
    with document.main:
        document.h1(page.cache_name(context, request))
        document.p(settings.cache_description or _DESCRIPTION, class_="lead")
        page.snippet(document, "URL", url, line=True)
        for key in keys:
            page.snippet(document, "Public key", key, line=True)
        if not keys:
            document.p(class_="warning").strong("This cache has no signing key.")
            document._(" Nix accepts only paths that already have a signature by a key that it trusts.")
        _set_up(document, url, keys, push=settings.push.enable)
        if facts:
            with document.section:
                document.h2("This cache now")
                with document.dl(class_="tiles"):
                    for term, value in facts:
                        with document.div:
                            document.dt(term).dd(value)
        document.p(f"Store directory {settings.virtual_nix_store}, priority {settings.priority}. ", class_="dim")
        document._("For programs: ").a("nix-cache-info", href="nix-cache-info")
    return page.end(context, document, script="copy")


def _set_up(document: Builder, url: str, keys: Sequence[str], *, push: bool) -> None:
    """Add a card with a tab for each way to use the cache. Radio buttons switch the tabs, without JavaScript."""
    tabs = [
        ("nix.conf", "/etc/nix/nix.conf, on any system", _nix_conf(url, keys)),
        ("NixOS", "configuration.nix", _nixos(url, keys)),
        ("Flake", "flake.nix, for all users of the flake", _flake(url, keys)),
        ("Once", "For one command, by a user in trusted-users", command("nix build nixpkgs#hello", url, keys)),
    ]
    if push:
        command_line = f"nix copy --to '{url}/push?secret-key=FILE' PATH"
        tabs.append(("Push", "With a token that has the scope push", command_line))
    with document.section(class_="tabs"):
        document.h2("Use it")
        with document.fieldset:
            document.legend("Where to configure the cache", class_="hidden")
            for number, (name, _, _) in enumerate(tabs):
                document.input(type="radio", name="tab", id=f"tab-{number}", checked=number == 0)
                document.label(name, for_=f"tab-{number}")
        for number, (_, caption, text) in enumerate(tabs):
            with document.div(class_=f"panel-{number}"):
                page.snippet(document, caption, text)


async def _facts(context: ServerContext, request: Request) -> list[tuple[str, object]]:
    """Return the facts about this cache that the client may know: as on `/search`, and as in `/metrics`."""
    settings = context.settings
    browses = context.may_browse(request) and settings.local_store
    reads_metrics = settings.metrics and settings.metrics_bind is None and "metrics" in context.scopes(request)
    facts: list[tuple[str, object]] = []
    # With a publish policy, the sums also count paths that are not published.
    if reads_metrics or (browses and context.paths.policy is None):
        paths, size = await context.store_size()
        if not math.isnan(size) and settings.local_store:
            facts += [("Paths", f"{paths:,}"), ("Size", page.size(round(size)))]
    if browses and (newest := await _kept(context, "newest", lambda: _newest(context))):
        [path] = newest
        link = E.a(path.path.name, href=f"path/{path.path.hash_part}")
        facts.append(("Newest path", link.br.span(page.moment(path.registered), class_="dim")))
    if reads_metrics:
        if (cache := context.compressor.cache) is not None:
            with suppress(OSError):
                used, _ = await _kept(context, "cache", cache.usage)
                facts.append(("Compressed NARs", f"{page.size(used)} of {page.size(cache.limit)}"))
        if context.upstreams is not None and (states := context.upstreams.states()):
            facts.append(("Upstreams", f"{sum(is_up for _, is_up in states)} of {len(states)} up"))
        facts.append(("Up since", page.moment(context.metrics.started)))
    return facts


async def _kept(context: ServerContext, name: str, make: Callable[[], _T]) -> _T:
    """Return the value of a function that runs in a thread, once in _FACT_MAX_AGE_S seconds."""
    key = (name, time.monotonic() // _FACT_MAX_AGE_S)
    return await context.made.value(key, None, make, lambda _: 200)


def _newest(context: ServerContext) -> list[ListedPath]:
    """Return the published path that became valid last, or none if there is none or the database cannot be read."""
    store = Store.of(context.settings)
    with closing(store.database), suppress(StoreUnavailableError):
        return queries.newest(store, 1, context.paths.publish_filter(store))
    return []


def _nix_conf(url: str, keys: Sequence[str]) -> str:
    lines = [f"extra-substituters = {url}"]
    if keys:
        lines.append(f"extra-trusted-public-keys = {' '.join(keys)}")
    return "\n".join(lines)


def _nixos(url: str, keys: Sequence[str]) -> str:
    lines = [f"substituters = [ {_nix_string(url)} ];"]
    if keys:
        lines.append(f"trusted-public-keys = [ {' '.join(map(_nix_string, keys))} ];")
    return _attributes("nix.settings", lines)


def _flake(url: str, keys: Sequence[str]) -> str:
    lines = [f"extra-substituters = [ {_nix_string(url)} ];"]
    if keys:
        lines.append(f"extra-trusted-public-keys = [ {' '.join(map(_nix_string, keys))} ];")
    return _attributes("nixConfig", lines)


def command(start: str, url: str, keys: Sequence[str]) -> str:
    """Return a Nix command with options that make it use this cache, in addition to the caches in nix.conf."""
    lines = [start, f"--option extra-substituters {url}"]
    if keys:
        lines.append(f"--option extra-trusted-public-keys {shlex.quote(' '.join(keys))}")
    return " \\\n  ".join(lines)


def _attributes(name: str, lines: Sequence[str]) -> str:
    return "\n".join([f"{name} = {{", *(f"  {line}" for line in lines), "};"])


def _nix_string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("${", "\\${")
    return f'"{escaped}"'

"""`/realisations/…` and `/build-trace-v2/…`: what the outputs of content-addressed derivations came out as."""

import logging
from urllib.parse import unquote_to_bytes

from sanic import Request
from sanic.exceptions import NotFound

from harmonia.nix.build_trace import Realisation, render_build_trace, render_realisation
from harmonia.nix.signing import is_signature
from harmonia.server.context import Cache
from harmonia.server.http import metadata
from harmonia.server.http.response import Representation

_SUFFIX = ".doi"

_log = logging.getLogger("harmonia")


async def get_realisation(cache: Cache, _: Request, name: str) -> Representation:
    """`<derivation's hash>!<output>.doi`, as Nix up to 2.34 asks for it."""
    realisation_id = _stem(name)
    derivation_hash, _mark, output = realisation_id.partition("!")
    found = await _checked(
        cache, name, await cache.threads.query(lambda: cache.store.realisation(derivation_hash, output))
    )
    return _representation(cache, render_realisation(realisation_id, found, cache.keys))


async def get(cache: Cache, _: Request, derivation: str, name: str) -> Representation:
    """`<derivation>/<output>.doi`, as newer Nixes ask for it."""
    derivation, output = _decoded(derivation), _stem(name)
    known = await cache.threads.query(lambda: cache.store.build_trace(derivation, output))
    found = await _checked(cache, name, known)
    return _representation(cache, render_build_trace(derivation, output, found, cache.keys))


def _decoded(text: str) -> str:
    """Nix from 2.32 on sends `!` and `+` encoded."""
    try:
        return unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        raise NotFound from None


def _stem(name: str) -> str:
    stem = _decoded(name)
    if not stem.endswith(_SUFFIX):
        raise NotFound
    return stem.removesuffix(_SUFFIX)


async def _checked(cache: Cache, name: str, realisation: Realisation | None) -> Realisation:
    if realisation is None or not await cache.paths.releases(realisation.out_path):
        raise NotFound
    for sig in realisation.sigs:
        if not is_signature(sig):
            _log.warning("%s: the stored signature %r is malformed and left out", name, sig)
    return realisation


def _representation(cache: Cache, text: bytes) -> Representation:
    return metadata.representation("application/json", text, cache.settings.narinfo_max_age)

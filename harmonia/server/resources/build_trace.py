"""`/realisations/…` and `/build-trace-v2/…`: output paths of content-addressed derivations (build trace entries)."""

import logging
import re
from urllib.parse import unquote_to_bytes

from sanic import Request
from sanic.exceptions import NotFound

from harmonia.errors import FormatError
from harmonia.nix.build_trace import Realisation, render_build_trace, render_realisation
from harmonia.nix.signing import is_signature
from harmonia.nix.store_path import StorePath
from harmonia.server.context import ServerContext
from harmonia.server.http.response import Representation
from harmonia.server.http.response_cache import AbsentError

_OUTPUT = re.compile(r"(?P<output>[0-9A-Za-z+._?=-]{1,211})\.doi")
_REALISATION = re.compile(rf"(?P<hash>sha256:[0-9a-f]{{64}})!{_OUTPUT.pattern}")

_log = logging.getLogger("harmonia")


async def get_realisation(context: ServerContext, _: Request, name: str) -> Representation:
    """Answer for `<derivation's hash>!<output>.doi`, which Nix up to 2.34 requests."""
    derivation_hash, output = parse_realisation_id(name)
    stored = await context.threads.run_db(lambda: context.store.realisation(derivation_hash, output))
    realisation = await _published(context, name, stored)
    return _representation(context, render_realisation(f"{derivation_hash}!{output}", realisation, context.keys))


async def get(context: ServerContext, _: Request, derivation: str, name: str) -> Representation:
    """Answer for `<derivation>/<output>.doi`, which Nix newer than 2.34 requests."""
    drv, output = parse_trace_key(derivation, name)
    stored = await context.threads.run_db(lambda: context.store.build_trace(drv, output))
    realisation = await _published(context, name, stored)
    return _representation(context, render_build_trace(drv, output, realisation, context.keys))


def parse_realisation_id(name: str) -> tuple[str, str]:
    """Return the hash (`sha256:` and 64 hexadecimal digits) and the output in `<hash>!<output>.doi`.

    Raises NotFound if the name is malformed.
    """
    match = _REALISATION.fullmatch(_decoded(name))
    if match is None:
        raise NotFound
    return match["hash"], match["output"]


def parse_trace_key(derivation: str, name: str) -> tuple[StorePath, str]:
    """Return the derivation and the output in `<derivation>/<output>.doi`.

    Raises NotFound if one of the two is malformed.
    """
    match = _OUTPUT.fullmatch(_decoded(name))
    if match is None:
        raise NotFound
    try:
        return StorePath(_decoded(derivation)), match["output"]
    except FormatError:
        raise NotFound from None


def _decoded(text: str) -> str:
    """Decode percent-encoding: Nix 2.32 and newer encode `!` and `+`. Raises NotFound if the text is not UTF-8."""
    try:
        return unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        raise NotFound from None


async def _published(context: ServerContext, name: str, realisation: Realisation | None) -> Realisation:
    """Return the realisation. Raises AbsentError if there is none, or if its output path may not be served."""
    if realisation is None or not await context.paths.is_published(realisation.out_path):
        raise AbsentError
    for sig in realisation.sigs:
        if not is_signature(sig):
            _log.warning("%s: skipping a stored signature: %r is malformed; sign the realisation again", name, sig)
    return realisation


def _representation(context: ServerContext, text: bytes) -> Representation:
    return Representation.of_metadata("application/json", text, context.settings.narinfo_max_age)

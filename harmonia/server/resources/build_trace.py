"""`/realisations/…` and `/build-trace-v2/…`: what the outputs of content-addressed derivations came out as."""

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
from harmonia.server.http import metadata
from harmonia.server.http.response import Representation
from harmonia.server.http.response_cache import AbsentError

_OUTPUT = re.compile(r"(?P<output>[0-9A-Za-z+._?=-]{1,211})\.doi")
_REALISATION = re.compile(rf"(?P<hash>sha256:[0-9a-f]{{64}})!{_OUTPUT.pattern}")

_log = logging.getLogger("harmonia")


async def get_realisation(context: ServerContext, _: Request, name: str) -> Representation:
    """`<derivation's hash>!<output>.doi`, as Nix up to 2.34 asks for it."""
    derivation_hash, output = parse_realisation_id(name)
    known = await context.threads.run_db(lambda: context.store.realisation(derivation_hash, output))
    found = await _checked(context, name, known)
    return _representation(context, render_realisation(f"{derivation_hash}!{output}", found, context.keys))


async def get(context: ServerContext, _: Request, derivation: str, name: str) -> Representation:
    """`<derivation>/<output>.doi`, as newer Nixes ask for it."""
    drv, output = parse_trace_key(derivation, name)
    known = await context.threads.run_db(lambda: context.store.build_trace(drv, output))
    found = await _checked(context, name, known)
    return _representation(context, render_build_trace(drv, output, found, context.keys))


def parse_realisation_id(name: str) -> tuple[str, str]:
    """Return the hash (`sha256:` and 64 hexadecimal digits) and the output that `<hash>!<output>.doi` names.

    Raises NotFound if the name is malformed.
    """
    found = _REALISATION.fullmatch(_decoded(name))
    if found is None:
        raise NotFound
    return found["hash"], found["output"]


def parse_trace_key(derivation: str, name: str) -> tuple[StorePath, str]:
    """Return the derivation and the output that `<derivation>/<output>.doi` names.

    Raises NotFound if one of the two is malformed.
    """
    found = _OUTPUT.fullmatch(_decoded(name))
    if found is None:
        raise NotFound
    try:
        return StorePath(_decoded(derivation)), found["output"]
    except FormatError:
        raise NotFound from None


def _decoded(text: str) -> str:
    """Nix from 2.32 on sends `!` and `+` encoded."""
    try:
        return unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        raise NotFound from None


async def _checked(context: ServerContext, name: str, realisation: Realisation | None) -> Realisation:
    if realisation is None or not await context.paths.is_published(realisation.out_path):
        raise AbsentError
    for sig in realisation.sigs:
        if not is_signature(sig):
            _log.warning("%s: the stored signature %r is malformed and left out", name, sig)
    return realisation


def _representation(context: ServerContext, text: bytes) -> Representation:
    return metadata.representation("application/json", text, context.settings.narinfo_max_age)

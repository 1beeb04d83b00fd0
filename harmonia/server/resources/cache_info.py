"""`/nix-cache-info`: store directory and priority, requested first (Nix `src/libstore/binary-cache-store.cc`).

`GetNarInfosV1` names the resource for many narinfos, relative to the store URL (bulk_narinfo.py). `ClosureV1` is the
suffix of a hash part in the URL of its closure (closure.py), which only a Harmonia has.
"""

from sanic import Request

from harmonia.server.context import ServerContext
from harmonia.server.http.response import Representation


async def get(context: ServerContext, _: Request) -> Representation:
    return _cache_info(context, "GetNarInfosV1: get-narinfos-v1\nClosureV1: .closure\n")


async def get_for_push(context: ServerContext, _: Request) -> Representation:
    return _cache_info(context, "GetNarInfosV1: get-narinfos-v1\n")


def _cache_info(context: ServerContext, capabilities: str) -> Representation:
    settings = context.settings
    lines = f"StoreDir: {settings.virtual_nix_store}\nWantMassQuery: 1\nPriority: {settings.priority}\n{capabilities}"
    return Representation(
        content_type="text/x-nix-cache-info", body=lines.encode(), cache_control="public, max-age=3600"
    )

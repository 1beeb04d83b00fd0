"""`/nix-cache-info`: store directory and priority, requested first (Nix `src/libstore/binary-cache-store.cc`).

`GetNarInfosV1` names the resource for many narinfos, relative to the store URL (bulk_narinfo.py).
"""

from sanic import Request

from harmonia.server.context import ServerContext
from harmonia.server.http.response import Representation


async def get(context: ServerContext, _: Request) -> Representation:
    settings = context.settings
    lines = f"StoreDir: {settings.virtual_nix_store}\nWantMassQuery: 1\nPriority: {settings.priority}\n"
    lines += "GetNarInfosV1: get-narinfos-v1\n"
    return Representation(
        content_type="text/x-nix-cache-info", body=lines.encode(), cache_control="public, max-age=3600"
    )

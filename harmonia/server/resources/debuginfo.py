"""`/debuginfo/<build id>`: the NAR with the debug info of a binary, for dwarffs and nixseparatedebuginfod2.

The content is what Nix writes into a binary cache with `index-debug-info=true`, there as `debuginfo/<build id>.debug`.
The archive is a URL relative to this resource. It is the plain NAR, because dwarffs can only decompress `.nar.xz`.
"""

import asyncio
import json
from functools import partial

from sanic import Request
from sanic.exceptions import NotFound

from harmonia.errors import StoreUnavailableError
from harmonia.nix.build_id import is_build_id, member
from harmonia.nix.path_info import PathInfo
from harmonia.server.context import ServerContext
from harmonia.server.http.response import Representation
from harmonia.server.http.response_cache import AbsentError
from harmonia.server.resources.narinfo import nar_url

_TIMEOUT_S = 2.0  # for which a response waits until the index has all paths
_POLL_S = 0.01


async def get(context: ServerContext, _: Request, name: str) -> Representation:
    build_id = parse_name(name)
    info = await _lookup_path(context, build_id)
    if info is None:
        raise AbsentError
    text = json.dumps({"archive": f"../{nar_url(info)}", "member": member(build_id)}).encode()
    return Representation.of_metadata("application/json", text, context.settings.narinfo_max_age)


def parse_name(name: str) -> str:
    """Return the build id in a name with or without `.debug`. Raises NotFound if the build id is malformed."""
    build_id = name.removesuffix(".debug")
    if not is_build_id(build_id):
        raise NotFound
    return build_id


async def _lookup_path(context: ServerContext, build_id: str) -> PathInfo | None:
    """Return a published path with the debug file of a build id, or None if there is none.

    Raises StoreUnavailableError if the index is not complete in time. The 503 makes dwarffs ask again after some
    seconds; it would cache a 404 for a day.
    """
    index = context.debug_info
    if index is None:
        return None
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _TIMEOUT_S
    while True:
        paths, complete = await context.threads.run_with_timeout(
            context.threads.index, partial(index.look_up, build_id)
        )
        for path in paths:
            signed = await context.paths.lookup_usable_path(path.hash_part)
            if signed is not None and signed.info.path == path:
                return signed.info
        if complete:
            return None
        if loop.time() > deadline:
            raise StoreUnavailableError("the index of debug info is not complete yet")
        index.scan_soon()
        await asyncio.sleep(_POLL_S)

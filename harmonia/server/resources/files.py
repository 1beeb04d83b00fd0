"""`/serve/<hash>/<path>`: files of a store path, for browsers.

With `?view`, a text is a page in our own style. Symlinks are followed within the store path, and to other published
paths. A client that knows the hash part can also download the NAR with the same files, so this is on by default.
"""

import hashlib
import os
import stat
from collections.abc import Sequence
from functools import partial
from http import HTTPStatus
from urllib.parse import quote, unquote_to_bytes

from sanic import Request
from sanic.exceptions import NotFound

from harmonia.errors import FormatError
from harmonia.nix import base32
from harmonia.nix.path_info import PathInfo
from harmonia.nix.store_path import StorePath, is_hash_part
from harmonia.server import page
from harmonia.server.context import ServerContext
from harmonia.server.http import content_type
from harmonia.server.http.response import IMMUTABLE, Representation
from harmonia.server.resources import directory, text_file
from harmonia.server.resources.nar import require_info
from harmonia.store import object_files
from harmonia.store.gc_roots import MAX_SYMLINKS
from harmonia.store.object_files import Entry, File

_MAX_PATH_BYTES = 4096  # as in Linux (path_resolution(7))

# A page from the store may have untrusted scripts. They must not read other resources of this cache with the rights of
# the user: by a cookie of a proxy in front, or from the user's network. In a sandbox, a page has an origin of its own
# (HTML section 7.1.1, "opaque origin"). It can only read what CORS allows to all: this resource, for its own modules,
# fonts and data. It has no cookies and no local storage. All types except PDF get the header, because only browsers
# know which types can run scripts.
_SANDBOX = "sandbox allow-downloads allow-forms allow-modals allow-popups allow-scripts"


async def get(context: ServerContext, request: Request, where: str) -> Representation:  # noqa: ARG001 (`where` is decoded; the raw path is needed)
    if not context.settings.serve_files:
        raise NotFound
    _, _, hash_part, *encoded = request.path.split("/")
    names = [unquote_to_bytes(name) for name in encoded]
    as_directory = names[-1:] == [b""]
    names = names[:-1] if as_directory else names
    if not is_hash_part(hash_part) or any(name in (b"", b".", b"..") or set(name) & set(b"/\0") for name in names):
        raise NotFound
    info = require_info(await context.paths.lookup_path(hash_part))
    entry = await _resolve(context, info, names)
    if not stat.S_ISDIR(entry.status.st_mode):
        if as_directory:
            raise NotFound
        if "view" in request.get_args(keep_blank_values=True):
            return await text_file.representation(context, request, info, names, entry)
        return _file(context, entry)
    if not as_directory:
        return page.redirect(
            f"./{quote(names[-1] if names else hash_part, safe='')}/", HTTPStatus.MOVED_PERMANENTLY, IMMUTABLE
        )
    try:
        index = await _resolve(context, entry.info, [*entry.names, b"index.html"])
    except NotFound:
        index = entry
    if stat.S_ISREG(index.status.st_mode):
        return _file(context, index)
    return await directory.representation(context, request, info, names, entry)


async def _resolve(context: ServerContext, info: PathInfo, names: Sequence[bytes]) -> Entry:
    """Return the entry at `names` in a store path, following symlinks.

    Raises NotFound if there is none, or if a symlink leads out of the published paths.
    """
    parts = [os.fsencode(info.path), *names]
    for _ in range(MAX_SYMLINKS + 1):
        if sum(map(len, parts)) + len(parts) > _MAX_PATH_BYTES:
            break
        if parts[0] != os.fsencode(info.path):
            info = await _lookup_info(context, parts[0])
        step = await context.threads.run_io(partial(object_files.lookup_entry, context.store, info, parts[1:]))
        if isinstance(step, Entry):
            return step
        if not step:  # a symlink leads out of the store, or to the store directory itself
            break
        parts = step
    raise NotFound


async def _lookup_info(context: ServerContext, base_name: bytes) -> PathInfo:
    try:
        path = StorePath(os.fsdecode(base_name))
    except FormatError:
        raise NotFound from None
    info = require_info(await context.paths.lookup_path(path.hash_part))
    if info.path != path:
        raise NotFound
    return info


def _file(context: ServerContext, entry: Entry) -> Representation:
    body = File(context.store.real_path(entry.info.path), entry.names, entry.status)
    inner = b"/".join(entry.names)
    kind = content_type.of(entry.names[-1] if entry.names else os.fsencode(entry.info.path), entry.sample)
    headers = {"x-content-type-options": "nosniff", "access-control-allow-origin": "*"}
    if kind != content_type.PDF:  # Chromium does not show PDF in a sandbox
        headers["content-security-policy"] = _SANDBOX
    return Representation(
        content_type=kind,
        body=body,
        cache_control=IMMUTABLE,
        etag=f'"{base32.encode(entry.info.nar_hash)}-{hashlib.sha256(inner).hexdigest()[:32]}"',
        zstd=context.encoded(body),
        worthwhile=content_type.is_compressible(kind) and not context.compressor.encoder.saturated,
        headers=headers,
    )

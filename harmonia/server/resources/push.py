"""`/push`: the store URL for uploads with `nix copy --to`. It never uses an upstream.

Nix asks for a narinfo, sends the NAR under the hash of its file, and then the narinfo, references first. The NAR waits
in the spool for its narinfo; the response to the narinfo is 200 once the path is valid in the store. Resources that the
server makes itself, such as listings, are accepted and dropped.

Refusals are 4xx with one line: the reason, and its remedy. Nix up to 2.32 repeats a request after 5xx with an empty
body, and aborts a request after 300 s without a byte.
"""

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import replace
from functools import partial, wraps
from typing import TYPE_CHECKING

from sanic import Request
from sanic.exceptions import NotFound, SanicException

from harmonia.errors import FormatError, PushRefusedError, RequestRefusedError, StoreObjectError
from harmonia.metrics.outcome import Outcome
from harmonia.nix import base32, narinfo
from harmonia.nix.build_trace import parse_realisation
from harmonia.nix.narinfo import NarFile
from harmonia.nix.path_info import PathInfo
from harmonia.nix.store_path import StoreDirError, StorePath
from harmonia.push.importer import SMALL_NAR_BYTES, MaySign, Upload
from harmonia.push.receiver import PushReceiver
from harmonia.server.context import ServerContext
from harmonia.server.http import sanic_adapter
from harmonia.server.http.request_body import STALL_S, content_length, decoder_of, dropping, read_small
from harmonia.server.http.response import Handler, Representation
from harmonia.server.http.response_cache import ABSENT, AbsentError, Content, Resources
from harmonia.server.http.small_uploads import MAX_BODY_BYTES
from harmonia.server.path_lookup import Unknown
from harmonia.server.resources import build_log, build_trace, nar
from harmonia.server.resources.narinfo import content_of, nar_url, representation

if TYPE_CHECKING:
    from harmonia.config.tokens import Token

_NARINFO = rf"/push/([{base32.ALPHABET}]{{32}})\.narinfo".encode()
_NAR = rf"/push/nar/([{base32.ALPHABET}]{{52}})\.nar(?:\.[a-z0-9]+)?".encode()
UPLOAD = re.compile(_NARINFO + b"|" + _NAR)
"""Uploads that can be stored without Sanic. The only group that matches is the name of the resource."""
_SPOOLED = re.compile(rf"(?:nar/)?(?P<file_hash>[{base32.ALPHABET}]{{52}})\.nar(?:\.[a-z0-9]+)?")
_MAX_NARINFO_BYTES = 1 << 20
_LOOP_NARINFO_BYTES = 16 << 10  # of some 400 references: to parse them takes 0.5 ms
_MAX_REALISATION_BYTES = 256 << 10
_CHUNK_BYTES = 256 * 1024
_SILENCE_S = 60.0  # until the first byte of a response, and between two bytes of it

_log = logging.getLogger("harmonia")


class _Progress:
    """The body of a response during a long import: a dot for each minute. It breaks off if the import fails."""

    size: int | None = None

    def __init__(self, importing: "asyncio.Future[bool]") -> None:
        self._importing = importing

    async def read(self, _start: int, _stop: int | None) -> AsyncGenerator[bytes]:
        while not self._importing.done():
            yield b"."
            await asyncio.wait([self._importing], timeout=_SILENCE_S)
        self._importing.result()
        yield b"\n"

    def close(self) -> None:
        pass


async def get_narinfo(context: ServerContext, request: Request, hash_part: str) -> Representation:
    """Return the narinfo of any valid path, published or not, so that Nix does not push it again."""
    info = await context.paths.lookup_valid_path(hash_part)

    def still_valid() -> bool:
        try:
            return context.paths.lookup_valid_now(hash_part) == info
        except StoreObjectError:
            return False

    if info is None:
        raise AbsentError(still_valid)
    return replace(representation(context, request, info, _plain(info), info.sigs, max_age=0), still_valid=still_valid)


async def get_nar(context: ServerContext, request: Request, name: str) -> Representation:
    """Return a NAR of the store. HEAD also finds NARs in the spool, so that Nix does not send them again."""
    match = _SPOOLED.fullmatch(name)
    if match is None or request.query_string:
        return await nar.get(context, request, name)
    spool, file_hash = _receiver(context).spool, match["file_hash"]
    if await context.threads.run_short_io(partial(spool.has, file_hash)) and request.method == "HEAD":
        await context.threads.run_io(partial(spool.renew, file_hash))
        return _done()
    raise AbsentError(partial(_is_absent_now, context, file_hash))


def _is_absent_now(context: ServerContext, file_hash: str) -> bool:
    """Return True if the spool certainly lacks a file. Does not block."""
    loop_io = context.threads.loop_io
    return loop_io.allowed and not loop_io.run(partial(_receiver(context).spool.has, file_hash))


def resources(context: ServerContext) -> list[Resources]:
    """Return the resources that pushers ask for, for requests that are answered without Sanic."""
    if context.push is None:
        return []

    def narinfo_now(hash_part: str, *, forwarded: bool) -> tuple[Content, Outcome] | None:  # noqa: ARG001 (never of an upstream)
        try:
            info = context.paths.lookup_valid_now(hash_part)
        except StoreObjectError:
            return None
        if isinstance(info, Unknown) or info is None:
            return (ABSENT, Outcome.NONE) if info is None else None
        return content_of(context, info, _plain(info), info.sigs, max_age=0), Outcome.STORE

    def nar_now(file_hash: str, *, forwarded: bool) -> tuple[Content, Outcome] | None:  # noqa: ARG001 (never of an upstream)
        return (ABSENT, Outcome.NONE) if _is_absent_now(context, file_hash) else None

    wanted = rb"(?:GET|HEAD) "
    return [Resources(re.compile(wanted + _NARINFO), narinfo_now), Resources(re.compile(wanted + _NAR), nar_now)]


def _plain(info: PathInfo) -> NarFile:
    return NarFile(nar_url(info), "none", info.nar_hash, info.nar_size)


async def put_nar(context: ServerContext, request: Request, name: str) -> Representation:
    match = _SPOOLED.fullmatch(name)
    if match is None:
        raise PushRefusedError(400, "the name of a NAR is its base-32 SHA-256 and .nar; push with `nix copy`")
    receiver = _receiver(context)
    size = content_length(request)
    if size > MAX_BODY_BYTES:
        await receiver.receive(match["file_hash"], size, _gathered(sanic_adapter.body_of(request, STALL_S)))
        return _done()
    body = b"".join([data async for data in sanic_adapter.body_of(request, STALL_S)])
    count = await receiver.receive_small(match["file_hash"], body)
    count()
    return replace(_done(), store=receiver.receive_small)


async def put_narinfo(context: ServerContext, request: Request, hash_part: str) -> Representation:
    body, may_sign = await read_small(request, _MAX_NARINFO_BYTES), _may_sign(request)
    importing = _receiver(context).start_import(await _parsed(context, hash_part, body), may_sign)
    await asyncio.wait([importing], timeout=_SILENCE_S)  # if the client disconnects, the import continues
    if not importing.done() and request.version != "1.0":
        return _done(_Progress(importing))
    await asyncio.shield(importing)
    is_plain = "content-encoding" not in request.headers
    return replace(_done(), store=partial(_import_small, context, may_sign) if is_plain else None)


async def _import_small(context: ServerContext, may_sign: MaySign, hash_part: str, body: bytes) -> Callable[[], None]:
    """Import a path with a small NAR. Raises any error if it is large, or cannot be imported.

    Return a function that counts nothing more: each valid path was counted once.
    """
    upload = await _parsed(context, hash_part, body)
    if upload.info.nar_size > SMALL_NAR_BYTES:
        raise PushRefusedError(413, "its import may take long")  # never sent
    await _receiver(context).import_path(upload, may_sign)
    return lambda: None


async def put_log(context: ServerContext, request: Request, name: str) -> Representation:
    try:
        derivation = StorePath(build_log.decoded(request, name))
        if not derivation.is_derivation:
            raise FormatError(f"{derivation} is not a derivation")
        codings = decoder_of(request)
    except FormatError as error:
        raise PushRefusedError(400, f"cannot keep the log: {error}; push it with `nix copy`") from None
    chunks = _gathered(sanic_adapter.body_of(request, STALL_S))
    await _receiver(context).receive_log(derivation, codings, chunks)
    return _done()


async def put_realisation(context: ServerContext, request: Request, name: str) -> Representation:
    derivation_hash, output = build_trace.parse_realisation_id(name)
    body = await read_small(request, _MAX_REALISATION_BYTES)
    try:
        realisation_id, realisation = parse_realisation(body)
    except FormatError as error:
        raise PushRefusedError(400, f"the realisation is malformed: {error}; push with `nix copy`") from None
    if realisation_id != f"{derivation_hash}!{output}":
        raise PushRefusedError(400, "the realisation's id is not the one in its URL; push with `nix copy`")
    await _receiver(context).register(realisation_id, realisation, _may_sign(request))
    return _done()


async def drop(context: ServerContext, request: Request, **_: str) -> Representation:
    """Read and drop an upload of a resource that the server makes itself."""
    _receiver(context).spool.check_size(content_length(request))
    async for _data in sanic_adapter.body_of(request, STALL_S):
        pass
    return _done()


def for_readers(handler: Handler) -> Handler:
    """Return a handler whose content needs the scope `read`, too. HEAD, by which Nix looks for files, does not."""

    @wraps(handler)
    async def get(context: ServerContext, request: Request, **parameters: str) -> Representation:
        if request.method != "HEAD" and "read" not in context.scopes(request):
            what = "the token lacks the scope read; make another with `harmonia token NAME --scope push --scope read`"
            raise RequestRefusedError(403, what)
        return await handler(context, request, **parameters)

    return get


def receiving(handler: Handler) -> Handler:
    """Return a handler for PUT that answers each error with 4xx, after it has dropped the rest of the body."""

    async def put(context: ServerContext, request: Request, **parameters: str) -> Representation:
        try:
            return await handler(context, request, **parameters)
        except Exception:
            if context.push is not None:
                context.push.counters.push_refusals += 1
            raise

    return dropping(put, _refusal)


def _refusal(request: Request, error: Exception) -> Exception:
    match error:
        case RequestRefusedError() | SanicException(status_code=400 | 401 | 403 | 404 | 405 | 411 | 413 | 429):
            return error
        case TimeoutError():
            return PushRefusedError(400, f"no byte of the body arrived for {STALL_S:.0f} s; push again")
    _log.error("%s %s: push failed: %s", request.method, request.path, error, exc_info=error)
    return PushRefusedError(409, "the server failed; push again, or see the server's log")


def _receiver(context: ServerContext) -> PushReceiver:
    if context.push is None:
        raise NotFound
    return context.push


def _may_sign(request: Request) -> MaySign:
    """Return whether the server may sign a path of this pusher, by the path's name."""
    token: Token | None = getattr(request.ctx, "token", None)
    return token.may_sign if token is not None else lambda _: False


def _done(body: bytes | _Progress = b"") -> Representation:
    return Representation(content_type="text/plain; charset=utf-8", body=body, cache_control="no-store")


async def _gathered(pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    """Yield the bytes in chunks of at least 256 KiB: to wake a thread takes longer than to copy them."""
    chunk = bytearray()
    async for piece in pieces:
        chunk += piece
        if len(chunk) >= _CHUNK_BYTES:
            yield bytes(chunk)
            chunk.clear()
    if chunk:
        yield bytes(chunk)


async def _parsed(context: ServerContext, hash_part: str, body: bytes) -> Upload:
    """Return what a narinfo uploads, as `_parse`, which a thread runs if the narinfo is long."""
    parse = partial(_parse, context, hash_part, body)
    return parse() if len(body) <= _LOOP_NARINFO_BYTES else await context.threads.run_io(parse)


def _parse(context: ServerContext, hash_part: str, body: bytes) -> Upload:
    """Return what a narinfo uploads. Raises PushRefusedError if it is malformed, or not that of `hash_part`."""
    store_dir = context.settings.virtual_nix_store
    try:
        info, nar_file = narinfo.parse(body.decode(), store_dir)
    except StoreDirError:
        what = f"this server's store is {store_dir}, so it cannot take paths of other store directories"
        raise PushRefusedError(400, what) from None
    except (FormatError, UnicodeDecodeError) as error:
        raise PushRefusedError(400, f"the narinfo is malformed: {error}; push with `nix copy`") from None
    if info.path.hash_part != hash_part:
        raise PushRefusedError(400, f"the narinfo is that of {info.path}, not the one in its URL; push with `nix copy`")
    match = _SPOOLED.fullmatch(nar_file.url)
    file_hash = match["file_hash"] if match else None
    if nar_file.file_hash is not None and match and base32.encode(nar_file.file_hash) != file_hash:
        raise PushRefusedError(400, "the narinfo's FileHash is not that of its URL; push the path again")
    return Upload(info, nar_file.compression, file_hash)

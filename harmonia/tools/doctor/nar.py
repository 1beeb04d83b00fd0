"""Checks of NARs: downloadable, and equal to their narinfos in hash and size."""

import hashlib
from collections.abc import Iterable, Iterator

from harmonia.errors import FormatError
from harmonia.nix import base32, nar_parser
from harmonia.nix.narinfo import NarFile
from harmonia.nix.path_info import PathInfo
from harmonia.tools.doctor import transfer
from harmonia.tools.doctor.answer import caching, head
from harmonia.tools.doctor.finding import Finding, Findings
from harmonia.tools.doctor.unpack import DAMAGED, UNPACK
from harmonia.tools.http_client import Client

_OK = 200
_AGAIN = "in a store, run nix-store --repair-path; in a static cache, delete narinfo and NAR, and copy the path again"
_LOST = (
    "check the server's log, and its store for damage: harmonia verify {path}; a static cache must keep"
    " NARs for 30 days, because clients cache narinfos for that long"
)


def check(client: Client, info: PathInfo, file: NarFile, largest: int) -> Findings:
    """Download a NAR and check its content, headers, byte ranges and content codings."""
    if max(info.nar_size, file.file_size or 0) > largest:
        what = f"{info.path}: its NAR of {info.nar_size} bytes was not downloaded"
        yield Finding("NAR", "skipped", f"{what}; raise --largest to include it")
        return
    answer = client.get(file.url)
    if answer.status != _OK:
        what = f"{file.url} returns {answer.status}, although a narinfo refers to it"
        yield Finding("NAR", "error", what, _LOST.format(path=info.path))
        return
    coding = answer.headers.get("content-encoding", "").lower()
    if coding:
        remedy = (
            "send Content-Encoding only if the client accepts it, never `identity`: older versions of Nix fail on both"
        )
        yield Finding(
            "NAR", "error", f"{file.url} has Content-Encoding: {coding}, which the client did not request", remedy
        )
        return
    yield _content(info, file, answer.body)
    yield from caching(client, file.url, answer, 30 * 86400)
    yield from head(client, file.url)
    yield from transfer.ranges(client, file.url, answer)
    yield from transfer.compression(client, file, answer)


def _content(info: PathInfo, file: NarFile, body: bytes) -> Finding:
    """Check a NAR against its narinfo. Of several problems, return the one closest to the cause."""
    can_unpack = file.compression in UNPACK
    try:
        wrong = _difference(info, UNPACK[file.compression](body)) if can_unpack else None
    except FormatError as error:
        wrong = f"{file.url} is not a NAR: {error}"
    except DAMAGED as error:
        wrong = f"{file.url} is not {file.compression}, or damaged: {error}"
    if wrong is None and file.file_size not in (None, len(body)):
        wrong = f"{file.url} has {len(body)} bytes, but its narinfo says {file.file_size}"
    if wrong is None and file.file_hash not in (None, hashlib.sha256(body).digest()):
        wrong = f"{file.url} does not match the FileHash of its narinfo"
    if wrong:
        return Finding("NAR", "error", wrong, _AGAIN)
    if not can_unpack:
        return Finding("NAR", "skipped", f"{file.url}: this doctor cannot decompress {file.compression}")
    return Finding("NAR", "ok", f"{info.path}: hash and size of the NAR are right")


def _difference(info: PathInfo, chunks: Iterable[bytes]) -> str | None:
    """Return how a NAR differs from its narinfo, or None. Raises FormatError if it is not a NAR."""
    sha256, size = hashlib.sha256(), 0

    def counted() -> Iterator[bytes]:
        nonlocal size
        for chunk in chunks:
            sha256.update(chunk)
            size += len(chunk)
            yield chunk

    for _ in nar_parser.parse(counted()):
        pass
    if size != info.nar_size:
        return f"the NAR has {size} bytes, but its narinfo says {info.nar_size}"
    if sha256.digest() != info.nar_hash:
        return f"the NAR hash is sha256:{base32.encode(sha256.digest())}, not the one in its narinfo"
    return None

"""NARs: that they come, and hold what their narinfos say."""

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
_AGAIN = (
    "in a store, nix-store --repair-path; in a directory of files, remove the narinfo and the NAR, and copy them anew"
)
_LOST = (
    "look at the server's log, and for damage in its store: harmonia verify {path}; a directory of files has to keep"
    " NARs for the 30 days that clients remember narinfos"
)


def check(client: Client, info: PathInfo, file: NarFile, largest: int) -> Findings:
    if max(info.nar_size, file.file_size or 0) > largest:
        what = f"{info.path}: its NAR of {info.nar_size} bytes was not downloaded"
        yield Finding("NAR", "skipped", f"{what}; --largest takes it in")
        return
    answer = client.get(file.url)
    if answer.status != _OK:
        what = f"{file.url} answers {answer.status}, though a narinfo leads to it"
        yield Finding("NAR", "error", what, _LOST.format(path=info.path))
        return
    coding = answer.headers.get("content-encoding", "").lower()
    if coding:
        remedy = "send Content-Encoding only to those who ask for it, and never `identity`: older Nixes fail on both"
        yield Finding(
            "NAR", "error", f"{file.url} comes with Content-Encoding: {coding}, which nobody asked for", remedy
        )
        return
    yield _content(info, file, answer.body)
    yield from caching(client, file.url, answer, 30 * 86400)
    yield from head(client, file.url)
    yield from transfer.ranges(client, file.url, answer)
    yield from transfer.compression(client, file, answer)


def _content(info: PathInfo, file: NarFile, body: bytes) -> Finding:
    """Where several things are wrong, that which is the most telling."""
    known = file.compression in UNPACK
    try:
        wrong = _difference(info, UNPACK[file.compression](body)) if known else None
    except FormatError as error:
        wrong = f"{file.url} is no NAR: {error}"
    except DAMAGED as error:
        wrong = f"{file.url} is not {file.compression}, or damaged: {error}"
    if wrong is None and file.file_size not in (None, len(body)):
        wrong = f"{file.url} has {len(body)} bytes, and its narinfo says {file.file_size}"
    if wrong is None and file.file_hash not in (None, hashlib.sha256(body).digest()):
        wrong = f"{file.url} does not have the FileHash that its narinfo says"
    if wrong:
        return Finding("NAR", "error", wrong, _AGAIN)
    if not known:
        return Finding("NAR", "skipped", f"{file.url}: {file.compression} cannot be unpacked here")
    return Finding("NAR", "ok", f"{info.path}: hash and size of the NAR are right")


def _difference(info: PathInfo, chunks: Iterable[bytes]) -> str | None:
    """What of a NAR is not as its narinfo says. FormatError where it is none."""
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
        return f"the NAR has {size} bytes, and its narinfo says {info.nar_size}"
    if sha256.digest() != info.nar_hash:
        return f"the NAR hash is sha256:{base32.encode(sha256.digest())}, and not what its narinfo says"
    return None

"""NARs and small bodies of upstreams: in any chunks, bad content raises only errors of ours."""

import hashlib
from dataclasses import replace

from harmonia.errors import FormatError
from harmonia.nix.content_coding import decoder
from harmonia.nix.narinfo import NarFile
from harmonia.nix.path_info import PathInfo
from harmonia.nix.store_path import StorePath
from harmonia.upstream.nar_verifier import check_content

WORDS = [
    b"\xfd7zXZ\0",
    b"YZ",
    b"BZh9",
    b"1AY&SY",
    b"\x1f\x8b\x08",
    b"\x28\xb5\x2f\xfd",
    b"\x50\x2a\x4d\x18",
    b"LZIP\x01\x0c",
]
WORDS += [b"\x5d\0\0\x80\0", b"\x78\x9c", *(b"%d" % number for number in range(10))]

_KINDS = ["none", "xz", "bzip2", "gzip", "zstd", "br", "lzma", "lzip", "deflate"]
_LIMIT = 1 << 16
_INFO = PathInfo(StorePath("0123456789abcdfghijklmnpqrsvwxyz-name"), bytes(32), _LIMIT)


def check(data: bytes) -> bool:
    """Take the first byte as the compression, and the rest as the sent bytes."""
    kind, body = _KINDS[(data[:1] or b"0")[0] % 48 % len(_KINDS)], data[1:]
    content = _decoded(body, kind, len(body) or 1)
    assert kind in {"xz", "zstd", "br"} or _decoded(body, kind, 7) == content  # these may find garbage sooner or later
    if content is None:
        return False
    info = replace(_INFO, nar_size=len(content), nar_hash=hashlib.sha256(content).digest())
    # An empty body is valid in some codings, but is no NAR. libzstd accepts any blocks in an empty frame.
    assert kind == "deflate" or not content or _passes(body, kind, info)
    assert not _passes(body, kind, replace(info, nar_size=len(content) + 1))
    return True


def _decoded(body: bytes, kind: str, step: int) -> bytes | None:
    """Return the decoded body, or None if it is malformed or too long: small steps may reach the limit first."""
    inner = decoder([kind])
    if inner is None:
        return body
    content = bytearray()
    try:
        for start in range(0, len(body), step):
            for piece in inner.feed(body[start : start + step]):
                content += piece
                if len(content) > _LIMIT:
                    return None
    except FormatError:
        return None
    return bytes(content) if inner.whole else None


def _passes(body: bytes, kind: str, info: PathInfo) -> bool:
    if kind == "deflate":  # not a compression of NARs
        return False
    try:
        check_content(info, NarFile("nar/x", kind), (body[start : start + 7] for start in range(0, len(body), 7)))
    except FormatError:
        return False
    return True

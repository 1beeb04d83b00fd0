"""Checks of transfers: byte ranges, resumed downloads, content codings."""

from harmonia.nix.narinfo import NarFile
from harmonia.tools.doctor.finding import LOG, Finding, Findings
from harmonia.tools.doctor.unpack import DAMAGED, UNPACK
from harmonia.tools.http_client import Answer, Client

_PARTIAL, _UNSATISFIABLE = 206, 416
_CODINGS = ("zstd", "gzip")
_RFC_9110 = "follow RFC 9110, section 14, or omit Accept-Ranges"


def ranges(client: Client, path: str, whole: Answer) -> Findings:
    """Check byte ranges at the start, in the middle, at the end and beyond it, then a resumed download."""
    if whole.headers.get("accept-ranges", "").lower() != "bytes":
        remedy = "serve byte ranges, and send `Accept-Ranges: bytes`"
        yield Finding("ranges", "warning", f"{path}: no byte ranges, so interrupted downloads fail", remedy)
        return
    size, half = len(whole.body), len(whole.body) // 2
    parts = (("0-0", 0, 1), (f"{half}-{half + 9}", half, min(half + 10, size)), ("-5", size - 5, size))
    wrong = [what for part in parts if (what := _wrong_part(client, path, whole, part))]
    beyond = _range(client, path, f"{size}-")
    if beyond.status != _UNSATISFIABLE:
        wrong.append(f"bytes={size}- returns {beyond.status} instead of 416")
    if wrong:
        yield Finding("ranges", "error", f"{path}: {'; '.join(wrong)}", _RFC_9110)
    else:
        yield Finding("ranges", "ok", f"{path}: byte ranges are right")
        yield _resume(client, path, whole, half)


def _range(client: Client, path: str, text: str) -> Answer:
    # The request of Nix 2.14 to 2.33. Those versions decompress the response, and count decompressed bytes to resume.
    return client.get(path, {"Range": f"bytes={text}", "Accept-Encoding": "zstd, br, gzip"})


def _wrong_part(client: Client, path: str, whole: Answer, asked: tuple[str, int, int]) -> str | None:
    """Return what is wrong with the response to a range, or None.

    `asked` is the text of the range, its first byte, and the byte after its last.
    """
    text, start, stop = asked
    part = _range(client, path, text)
    if part.headers.get("content-encoding"):
        return f"bytes={text} has a Content-Encoding"
    if part.status != _PARTIAL:
        return f"bytes={text} returns {part.status} instead of 206"
    if part.headers.get("content-range") != f"bytes {start}-{stop - 1}/{len(whole.body)}":
        return f"bytes={text} has Content-Range: {part.headers.get('content-range')}"
    return None if part.body == whole.body[start:stop] else f"bytes={text} returns wrong bytes"


def _resume(client: Client, path: str, whole: Answer, half: int) -> Finding:
    """Check that a download interrupted half-way resumes the way Nix does it."""
    begun = client.get(path, stop=half).body
    rest = _range(client, path, f"{len(begun)}-")
    if rest.status != _PARTIAL or begun + rest.body != whole.body:
        what = f"{path}: a download interrupted at {len(begun)} bytes does not resume: clients retry, then fail"
        return Finding("resume", "error", what, _RFC_9110)
    if rest.headers.get("accept-ranges", "").lower() != "bytes":
        what = f"{path}: an interrupted download resumes, but only once"
        return Finding("resume", "warning", what, "send `Accept-Ranges: bytes` with each 206 as well")
    return Finding("resume", "ok", f"{path}: an interrupted download resumes")


def compression(client: Client, file: NarFile, whole: Answer) -> Findings:
    """Check content codings. They are independent of the NAR's own compression."""
    path = file.url
    asked = client.get(path, {"Accept-Encoding": ", ".join(_CODINGS)})
    coding = asked.headers.get("content-encoding", "").lower()
    if not coding:
        if file.compression == "none":
            remedy = "offer compressed NARs, or encode them with zstd if accepted; on a fast network, ignore this"
            yield Finding("compression", "warning", f"{path} is sent uncompressed", remedy)
        else:
            ratio = f", {len(whole.body)} bytes" if whole.body else ""
            yield Finding("compression", "ok", f"{path} is a {file.compression} file{ratio}")
        return
    wrong = []
    if coding not in _CODINGS:
        wrong.append((f"Content-Encoding {coding} was not requested", "send only encodings listed in Accept-Encoding"))
    else:
        try:
            same = b"".join(UNPACK[coding](asked.body)) == whole.body
        except DAMAGED:
            same = False
        if not same:
            wrong.append((f"the body encoded with {coding} decodes to different bytes", LOG))
    if "accept-encoding" not in asked.headers.get("vary", "").lower():
        wrong.append(
            (
                "no Vary: Accept-Encoding",
                "send it, otherwise HTTP caches serve encoded NARs to clients that cannot decode them",
            )
        )
    etag = asked.headers.get("etag", "")
    if etag and not etag.startswith("W/") and etag == whole.headers.get("etag"):
        wrong.append(
            (
                "encoded and unencoded bodies have the same ETag",
                "use different ETags, otherwise HTTP caches mix parts of both",
            )
        )
    refused = client.get(path, {"Accept-Encoding": f"{coding};q=0, identity"}, stop=0)
    if refused.headers.get("content-encoding"):
        wrong.append(
            (f"{coding} is sent even to clients that refuse it with q=0", "respect q-values (RFC 9110, section 12.5.3)")
        )
    yield from (Finding("compression", "error", f"{path}: {what}", remedy) for what, remedy in wrong)
    if not wrong:
        yield Finding("compression", "ok", f"{path}: encoded with {coding} only for clients that accept it")

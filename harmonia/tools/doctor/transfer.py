"""How NARs are sent: whole or in parts, so that a download resumes, and with content codings."""

from harmonia.nix.narinfo import NarFile
from harmonia.tools.doctor.finding import LOG, Finding, Findings
from harmonia.tools.doctor.unpack import DAMAGED, UNPACK
from harmonia.tools.http_client import Answer, Client

_PARTIAL, _UNSATISFIABLE = 206, 416
_CODINGS = ("zstd", "gzip")
_RFC_9110 = "follow RFC 9110, section 14, or leave out Accept-Ranges"


def ranges(client: Client, path: str, whole: Answer) -> Findings:
    if whole.headers.get("accept-ranges", "").lower() != "bytes":
        remedy = "serve byte ranges, and send `Accept-Ranges: bytes`"
        yield Finding("ranges", "warning", f"{path}: no ranges, so that a download that breaks off fails", remedy)
        return
    size, half = len(whole.body), len(whole.body) // 2
    parts = (("0-0", 0, 1), (f"{half}-{half + 9}", half, min(half + 10, size)), ("-5", size - 5, size))
    wrong = [what for part in parts if (what := _wrong_part(client, path, whole, part))]
    beyond = _range(client, path, f"{size}-")
    if beyond.status != _UNSATISFIABLE:
        wrong.append(f"bytes={size}- is answered {beyond.status}, where 416 should be")
    if wrong:
        yield Finding("ranges", "error", f"{path}: {'; '.join(wrong)}", _RFC_9110)
    else:
        yield Finding("ranges", "ok", f"{path}: byte ranges are right")
        yield _resume(client, path, whole, half)


def _range(client: Client, path: str, text: str) -> Answer:
    # As Nix 2.14 to 2.33 asks, which then would unpack what comes, and count bytes that were not packed.
    return client.get(path, {"Range": f"bytes={text}", "Accept-Encoding": "zstd, br, gzip"})


def _wrong_part(client: Client, path: str, whole: Answer, asked: tuple[str, int, int]) -> str | None:
    """What is wrong with the answer to that range, in words, and where it should begin and end."""
    text, start, stop = asked
    part = _range(client, path, text)
    if part.headers.get("content-encoding"):
        return f"bytes={text} comes with a Content-Encoding"
    if part.status != _PARTIAL:
        return f"bytes={text} is answered {part.status}, where 206 should be"
    if part.headers.get("content-range") != f"bytes {start}-{stop - 1}/{len(whole.body)}":
        return f"bytes={text} has Content-Range: {part.headers.get('content-range')}"
    return None if part.body == whole.body[start:stop] else f"bytes={text} brings other bytes"


def _resume(client: Client, path: str, whole: Answer, half: int) -> Finding:
    """A download that is cut in its midst, and goes on as Nix lets it go on."""
    begun = client.get(path, stop=half).body
    rest = _range(client, path, f"{len(begun)}-")
    if rest.status != _PARTIAL or begun + rest.body != whole.body:
        what = f"{path}: a download that was cut at {len(begun)} bytes does not resume: clients retry, then fail"
        return Finding("resume", "error", what, _RFC_9110)
    if rest.headers.get("accept-ranges", "").lower() != "bytes":
        what = f"{path}: a download that was cut resumes, but only once"
        return Finding("resume", "warning", what, "send `Accept-Ranges: bytes` with each 206, too")
    return Finding("resume", "ok", f"{path}: a download that was cut resumes")


def compression(client: Client, file: NarFile, whole: Answer) -> Findings:
    """Content codings, whatever the NAR's own compression."""
    path = file.url
    asked = client.get(path, {"Accept-Encoding": ", ".join(_CODINGS)})
    coding = asked.headers.get("content-encoding", "").lower()
    if not coding:
        if file.compression == "none":
            remedy = "offer compressed NARs, or encode them with zstd where accepted; on a fast network, leave it so"
            yield Finding("compression", "warning", f"{path} is sent uncompressed", remedy)
        else:
            ratio = f", {len(whole.body)} bytes" if whole.body else ""
            yield Finding("compression", "ok", f"{path} is a {file.compression} file{ratio}")
        return
    wrong = []
    if coding not in _CODINGS:
        wrong.append((f"Content-Encoding {coding} was not asked for", "send only what Accept-Encoding names"))
    else:
        try:
            same = b"".join(UNPACK[coding](asked.body)) == whole.body
        except DAMAGED:
            same = False
        if not same:
            wrong.append((f"what comes encoded with {coding} is something else", LOG))
    if "accept-encoding" not in asked.headers.get("vary", "").lower():
        wrong.append(("no Vary: Accept-Encoding", "send it, or caches give encoded NARs to those who cannot read them"))
    etag = asked.headers.get("etag", "")
    if etag and not etag.startswith("W/") and etag == whole.headers.get("etag"):
        wrong.append(("encoded or not, the ETag is the same", "give each its own: caches join their parts otherwise"))
    refused = client.get(path, {"Accept-Encoding": f"{coding};q=0, identity"}, stop=0)
    if refused.headers.get("content-encoding"):
        wrong.append(
            (f"{coding} is sent also to those who refuse it with q=0", "heed q-values (RFC 9110, section 12.5.3)")
        )
    yield from (Finding("compression", "error", f"{path}: {what}", remedy) for what, remedy in wrong)
    if not wrong:
        yield Finding("compression", "ok", f"{path}: encoded with {coding} for those who accept it, and only for them")

"""A binary cache as its clients see it, whoever made it: what would fail them or slow them down, and remedies.

What is checked follows from what Nix clients do (docs/http-api.md): their parsers, their resumption of downloads, their
caching of narinfos for 30 days.
"""

import bz2
import hashlib
import lzma
import ssl
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Literal, NamedTuple, Protocol

import zstandard

from harmonia.client import Answer, Client
from harmonia.errors import FormatError, RemoteError
from harmonia.nix import base32, nar_reader, narinfo
from harmonia.nix.narinfo import NarFile
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import PublicKey

Level = Literal["ok", "skipped", "warning", "error"]


class Finding(NamedTuple):
    check: str
    level: Level
    what: str
    remedy: str = ""
    """What to do about a warning or an error."""


Findings = Iterator[Finding]

_OK, _MISSING, _PARTIAL, _NOT_MODIFIED, _UNSATISFIABLE = 200, 404, 206, 304, 416
_CLOCK = 60  # seconds of difference from which HTTP caches, and certificates, begin to suffer
_EXPIRY = 14 * 86400  # seconds before a certificate's end at which somebody should know
_NEGATIVE = 3600  # seconds; Nix remembers no longer that a path is missing
_DAMAGED = (OSError, EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError)
_PIECE = 1 << 18
_WINDOW = 1 << 27  # bytes; what every Nix can unpack
_COMPARED = ("content-type", "content-length", "content-encoding", "etag", "cache-control", "last-modified", "vary")
_LOG = "look at the server's log"
_REFUSED = {
    401: "put the token for it into /etc/nix/netrc, as its clients have to (docs/security.md)",
    403: "let everybody read",
    407: "give it a user's name and password",
}


def examine(
    client: Client,
    samples: Iterable[str],
    keys: Sequence[PublicKey],
    *,
    store_dir: str,
    count: int,
    demanded: bool,
    largest: int,
) -> Findings:
    """What is found, in the order of a client's requests.

    `samples` are base names or hash parts of store paths, of which the first `count` that the cache has are looked at:
    if `demanded`, it should have all of them. NARs of more than `largest` bytes are not downloaded.
    """
    try:
        cache_info = client.get("nix-cache-info")
    except RemoteError as error:
        yield Finding("connection", "error", str(error), _unreachable(str(error)))
        return
    yield from _tls(client, cache_info)
    yield from _clock(cache_info)
    yield from _guarded("cache info", _cache_info(client, cache_info, store_dir))
    yield from _guarded("missing paths", _missing(client))
    looked = 0
    for sample in samples:
        if looked >= count:
            break
        try:
            there = client.get(f"{sample[:32]}.narinfo").status == _OK
        except RemoteError:
            there = True  # which is told below
        if there:
            looked += 1
            yield from _guarded("narinfo", _sample(client, sample, keys, store_dir, largest))
        elif demanded:
            yield Finding("narinfo", "error", f"{sample} is not in the cache", "copy it there, or add it to the store")
    if not looked and not demanded:
        yield Finding(
            "samples",
            "warning",
            "no path is known that this cache has, so that neither narinfos nor NARs were looked at",
            "name some of its paths: harmonia doctor URL /nix/store/…",
        )


def _guarded(check: str, findings: Findings) -> Findings:
    try:
        yield from findings
    except RemoteError as error:
        yield Finding(check, "error", str(error), _LOG)


def _unreachable(what: str) -> str:
    if "certificate" in what:
        return "serve the whole chain, for this host name; a private authority's certificate goes to NIX_SSL_CERT_FILE"
    return "see that the server runs, that this is its URL, and that no firewall is in between"


def _tls(client: Client, answer: Answer) -> Findings:
    if not answer.certificate:
        if client.url.startswith("http:"):
            yield Finding(
                "TLS", "skipped", "plain HTTP: signatures protect what is downloaded, but anybody can watch it"
            )
        return
    left = ssl.cert_time_to_seconds(str(answer.certificate["notAfter"])) - time.time()
    what = f"the certificate is trusted, and valid for {left / 86400:.0f} more days"
    if left < _EXPIRY:
        yield Finding("TLS", "warning", what, "renew it now, and see why that did not happen by itself")
    else:
        yield Finding("TLS", "ok", what)


def _clock(answer: Answer) -> Findings:
    try:
        date = parsedate_to_datetime(answer.headers["date"]).timestamp()
    except (KeyError, ValueError):
        yield Finding(
            "clock", "warning", "answers have no Date", "send one: HTTP caches reckon the age of answers by it"
        )
        return
    skew = date - time.time()
    if abs(skew) > _CLOCK:
        what = f"the server's clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} ours"
        yield Finding("clock", "warning", what, "set both by NTP: timedatectl set-ntp true")
    else:
        yield Finding("clock", "ok", "the server's clock and ours agree")


def _cache_info(client: Client, answer: Answer, store_dir: str) -> Findings:
    check = "cache info"
    if answer.status != _OK:
        what = f"nix-cache-info answers {answer.status}: clients do not take this for a binary cache"
        remedy = _REFUSED.get(
            answer.status, "check the URL, and its path; a directory of files needs one named nix-cache-info"
        )
        yield Finding(check, "error", what, remedy)
        return
    lines = answer.body.decode(errors="replace").splitlines()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    found = fields.get("StoreDir")
    if found is None:
        yield Finding(check, "warning", "no StoreDir: clients take any", f"add the line `StoreDir: {store_dir}`")
    elif found != store_dir:
        remedy = f"set it to {store_dir}, or use --store-dir {found} for a client of that store"
        yield Finding(check, "error", f"it is for the store {found}, not {store_dir}", remedy)
    if not fields.get("Priority", "0").isdigit():
        what = f"Priority {fields['Priority']!r} is no number: clients fail with `stoi`"
        yield Finding(check, "error", what, "make it a number: 40 is that of cache.nixos.org, less is asked earlier")
    if fields.get("WantMassQuery") != "1":
        what = "WantMassQuery is not 1: `nix-env -qas` and the like do not ask this cache"
        yield Finding(check, "warning", what, "add the line `WantMassQuery: 1`")
    priority = fields.get("Priority", "0, which is before all others")
    yield Finding(check, "ok", f"a binary cache for {found or 'any store'}, priority {priority}")
    yield from _head(client, "nix-cache-info")


def _missing(client: Client) -> Findings:
    check, path = "missing paths", f"{'0' * 32}.narinfo"
    answer, head = client.get(path), client.get(path, method="HEAD")
    remedy = "answer 404, to HEAD as to GET, for what is not there: with anything else, some clients give up"
    if answer.status != head.status:
        yield Finding(check, "error", f"GET answers {answer.status}, and HEAD {head.status}", remedy)
    elif answer.status == _MISSING:
        yield Finding(check, "ok", "a path that is not there is a plain 404")
    elif answer.status in (403, 410):
        yield Finding(check, "warning", f"a path that is not there is answered {answer.status}, as S3 does", remedy)
    else:
        yield Finding(check, "error", f"a path that is not there is answered {answer.status}", remedy)
    if answer.status != _OK and _max_age(answer) > _NEGATIVE:
        what = f"that something is missing may be remembered for {_max_age(answer)} s: new paths appear as late"
        yield Finding(check, "warning", what, "send `Cache-Control: no-store` with each 404")


def _head(client: Client, path: str, **headers: str) -> Findings:
    """HEAD tells what GET tells. Nix asks by HEAD whether a path is there."""
    answer, head = client.get(path, headers, stop=0), client.get(path, headers, method="HEAD")
    if answer.status != head.status:
        what = f"HEAD of {path} answers {head.status}, and GET {answer.status}"
        yield Finding(
            "HEAD", "error", what, "answer HEAD like GET, without the body: Nix asks so whether a path is there"
        )
        return
    different = [name for name in _COMPARED if answer.headers.get(name) != head.headers.get(name)]
    # A length that only one of them tells became known between the two.
    if "content-length" in different and "content-length" not in answer.headers.keys() & head.headers:
        different.remove("content-length")
    if different:
        what = f"HEAD and GET of {path} differ in {', '.join(different)}"
        yield Finding("HEAD", "warning", what, "send the same headers to both")
    else:
        yield Finding("HEAD", "ok", f"HEAD of {path} says what GET says")


def _sample(client: Client, sample: str, keys: Sequence[PublicKey], store_dir: str, largest: int) -> Findings:
    parsed = yield from _narinfo(client, sample, store_dir)
    if parsed is None:
        return
    info, file = parsed
    yield _signatures(info, keys, store_dir)
    yield from _head(client, f"{info.path.hash_part}.narinfo")
    yield from _guarded("NAR", _nar(client, info, file, largest))


def _narinfo(client: Client, sample: str, store_dir: str) -> Generator[Finding, None, tuple[PathInfo, NarFile] | None]:
    name = f"{sample[:32]}.narinfo"
    answer = client.get(name)
    if answer.headers.get("content-encoding"):
        coding = answer.headers["content-encoding"]
        remedy = "send it unencoded to those who do not ask for an encoding"
        yield Finding("narinfo", "error", f"{name} is encoded as {coding}, which nobody asked for", remedy)
        return None
    try:
        info, file = narinfo.parse(answer.body.decode(), store_dir)
    except (FormatError, UnicodeDecodeError) as error:
        remedy = "write it anew, as `nix copy --to` does: each line is a name, a colon, a space, a value and a line end"
        yield Finding("narinfo", "error", f"{name}: {error}", remedy)
        return None
    if sample not in (info.path, info.path.hash_part):
        remedy = "remove that narinfo: Nix takes the path for not there"
        yield Finding("narinfo", "error", f"{name}, asked for {sample}, tells of {info.path}", remedy)
        return None
    yield Finding("narinfo", "ok", f"{info.path}: its narinfo is as Nix wants it")
    yield from _caching(client, name, answer, 0)
    return info, file


def _signatures(info: PathInfo, keys: Sequence[PublicKey], store_dir: str) -> Finding:
    fingerprint = info.fingerprint(store_dir)
    by_name = {key.name: key for key in keys}
    names = [sig.partition(":")[0] for sig in info.sigs]
    good = [
        name
        for name, sig in zip(names, info.sigs, strict=True)
        if name in by_name and by_name[name].verify(fingerprint, sig)
    ]
    bad = [name for name in names if name in by_name and name not in good]
    if bad:
        remedy = "see that the public key is that of the server's secret key, and sign anew: nix store sign"
        return Finding("signatures", "error", f"{info.path}: the signature by {bad[0]} is wrong", remedy)
    if good:
        return Finding("signatures", "ok", f"{info.path}: signed by {', '.join(good)}")
    if info.ca is not None:
        return Finding("signatures", "ok", f"{info.path}: content-addressed, so that it needs no signature")
    if names:
        what = f"{info.path}: signed by {', '.join(dict.fromkeys(names))}, whose public key is not known here"
        remedy = (
            "give the key with --public-key, or in nix.conf: extra-trusted-public-keys; else clients refuse the path"
        )
        return Finding("signatures", "warning", what, remedy)
    remedy = "sign it: set sign_key_paths (Harmonia), or `nix store sign --key-file`; `harmonia keygen` makes a key"
    return Finding("signatures", "error", f"{info.path}: no signature, so that clients refuse it", remedy)


def _nar(client: Client, info: PathInfo, file: NarFile, largest: int) -> Findings:
    if max(info.nar_size, file.file_size or 0) > largest:
        what = f"{info.path}: its NAR of {info.nar_size} bytes was not downloaded"
        yield Finding("NAR", "skipped", f"{what}; --largest takes it in")
        return
    answer = client.get(file.url)
    if answer.status != _OK:
        remedy = "keep NARs as long as clients remember their narinfos: 30 days"
        yield Finding("NAR", "error", f"{file.url} answers {answer.status}, though a narinfo leads to it", remedy)
        return
    coding = answer.headers.get("content-encoding", "").lower()
    if coding:
        remedy = "send Content-Encoding only to those who ask for it, and never `identity`: older Nixes fail on both"
        yield Finding(
            "NAR", "error", f"{file.url} comes with Content-Encoding: {coding}, which nobody asked for", remedy
        )
        return
    yield from _content(info, file, answer.body)
    yield from _caching(client, file.url, answer, 30 * 86400)
    yield from _head(client, file.url)
    yield from _ranges(client, file.url, answer)
    yield from _compression(client, file, answer)


_AGAIN = "remove the narinfo and the NAR from the cache, and copy the path there anew"


def _content(info: PathInfo, file: NarFile, body: bytes) -> Findings:
    if file.file_size not in (None, len(body)):
        what = f"{file.url} has {len(body)} bytes, and its narinfo says {file.file_size}"
        yield Finding("NAR", "error", what, _AGAIN)
    if file.file_hash not in (None, hashlib.sha256(body).digest()):
        yield Finding("NAR", "error", f"{file.url} does not have the FileHash that its narinfo says", _AGAIN)
    if file.compression not in _DECODERS:
        yield Finding("NAR", "skipped", f"{file.url}: {file.compression} cannot be unpacked here")
        return
    try:
        wrong = _difference(info, _DECODERS[file.compression](body))
    except FormatError as error:
        wrong = f"{file.url} is no NAR: {error}"
    except _DAMAGED as error:
        wrong = f"{file.url} is not {file.compression}, or damaged: {error}"
    if wrong:
        yield Finding("NAR", "error", wrong, _AGAIN)
    else:
        yield Finding("NAR", "ok", f"{info.path}: hash and size of the NAR are right")


def _difference(info: PathInfo, chunks: Iterable[bytes]) -> str | None:
    """What of a NAR is not as its narinfo says. FormatError where it is none."""
    sha256, size = hashlib.sha256(), 0

    def counted() -> Iterator[bytes]:
        nonlocal size
        for chunk in chunks:
            sha256.update(chunk)
            size += len(chunk)
            yield chunk

    for _ in nar_reader.parse(counted()):
        pass
    if size != info.nar_size:
        return f"the NAR has {size} bytes, and its narinfo says {info.nar_size}"
    if sha256.digest() != info.nar_hash:
        return f"the NAR hash is sha256:{base32.encode(sha256.digest())}, and not what its narinfo says"
    return None


def _caching(client: Client, path: str, answer: Answer, least: int) -> Findings:
    """`least`: for how many seconds at least it should be kept."""
    control = answer.headers.get("cache-control")
    unwanted, wanted, keepers = ["no-store", "no-cache", "private"], "public", "proxies and CDNs"
    if client.brings_token:  # what takes one is for the client alone to keep
        unwanted, wanted, keepers = ["no-store", "no-cache"], "private", "clients"
    wanted += ", max-age=31536000, immutable" if least else ", max-age=86400"
    if control is None or any(word in control for word in unwanted):
        what = f"{path}: {'no Cache-Control' if control is None else f'Cache-Control: {control}'}"
        yield Finding("caching", "warning", what, f"send `Cache-Control: {wanted}`, so that {keepers} keep it")
    elif _max_age(answer) < least:
        remedy = f"a NAR never changes under its name: send `Cache-Control: {wanted}`"
        yield Finding("caching", "warning", f"{path} may be kept for {_max_age(answer)} s only", remedy)
    else:
        yield Finding("caching", "ok", f"{path}: Cache-Control: {control}")
    etag = answer.headers.get("etag")
    if etag is None and "last-modified" not in answer.headers:
        yield Finding(
            "caching", "warning", f"{path}: neither ETag nor Last-Modified", "send an ETag, to ask again for nothing"
        )
    elif etag is not None:
        again = client.get(path, {"If-None-Match": etag}, stop=0)
        if again.status != _NOT_MODIFIED:
            what = f"{path}: its own ETag in If-None-Match is answered {again.status}, where 304 should be"
            yield Finding("caching", "warning", what, "answer 304, or send no ETag")


_RFC_9110 = "follow RFC 9110, section 14, or leave out Accept-Ranges"


def _ranges(client: Client, path: str, whole: Answer) -> Findings:
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
    yield from (Finding("ranges", "error", f"{path}: {what}", _RFC_9110) for what in wrong)
    if not wrong:
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


def _compression(client: Client, file: NarFile, whole: Answer) -> Findings:
    """Content codings, whatever the NAR's own compression."""
    path = file.url
    asked = client.get(path, {"Accept-Encoding": "zstd, gzip"})
    coding = asked.headers.get("content-encoding", "").lower()
    if not coding:
        if file.compression == "none":
            remedy = "offer compressed NARs, or encode them with zstd where accepted; on a fast network, leave it so"
            yield Finding("compression", "warning", f"{path} is sent uncompressed", remedy)
        else:
            ratio = f", {len(whole.body)} bytes" if whole.body else ""
            yield Finding("compression", "ok", f"{path} is a {file.compression} file{ratio}")
        return
    codings: Mapping[str, Callable[[bytes], Iterator[bytes]]] = {"zstd": _zstd, "gzip": _gzip}
    wrong = []
    if coding not in codings:
        wrong.append((f"Content-Encoding {coding} was not asked for", "send only what Accept-Encoding names"))
    else:
        try:
            same = b"".join(codings[coding](asked.body)) == whole.body
        except _DAMAGED:
            same = False
        if not same:
            wrong.append((f"what comes encoded with {coding} is something else", _LOG))
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


def _max_age(answer: Answer) -> int:
    words = [word.strip().partition("=") for word in answer.headers.get("cache-control", "").split(",")]
    return max((int(value) for name, _, value in words if name == "max-age" and value.isdigit()), default=0)


def _pieces(body: bytes) -> Iterator[bytes]:
    return (body[start : start + _PIECE] for start in range(0, len(body), _PIECE))


class _Unpacker(Protocol):
    """What all decompressors of the standard library have in common, and zstandard's with them."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def _unpack(make: Callable[[], _Unpacker], body: bytes) -> Iterator[bytes]:
    """What a run of frames, streams or members holds. EOFError where the last one is not whole."""
    position = 0
    while position < len(body):
        unpacker = make()
        while not unpacker.eof:
            piece = body[position : position + _PIECE]
            if not piece:
                raise EOFError("it ends early")
            position += len(piece)
            yield unpacker.decompress(piece)
        position -= len(unpacker.unused_data)


_zstd = partial(_unpack, lambda: zstandard.ZstdDecompressor(max_window_size=_WINDOW).decompressobj())
_gzip = partial(_unpack, lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS))
_DECODERS: Mapping[str, Callable[[bytes], Iterator[bytes]]] = {
    "none": _pieces,
    "zstd": _zstd,
    "gzip": _gzip,
    "xz": partial(_unpack, lzma.LZMADecompressor),
    "bzip2": partial(_unpack, bz2.BZ2Decompressor),
}

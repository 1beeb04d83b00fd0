"""`harmonia doctor` reports exactly the faults of a cache, each with its check and a remedy."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from pathlib import Path

import pytest
import zstandard

from harmonia.config import tokens
from harmonia.nix import base32, narinfo
from harmonia.nix.narinfo import NarFile
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey
from harmonia.store import file_reader, tree_reader
from harmonia.tools.doctor import examine
from harmonia.tools.doctor.finding import Finding
from harmonia.tools.http_client import Client
from harmonia.tools.store_builder import StoreBuilder
from support.nginx import nginx
from support.programs import needs
from support.running import Server, run
from support.serving import QuietHandler, ThreadServer

KEY = SecretKey.generate("good-1")
NAR = "nar/file.nar"


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes = b""


@dataclass(frozen=True)
class Question:
    method: str
    path: str
    headers: dict[str, str]


Fault = Callable[[Question, Reply], Reply]


@dataclass
class Cache:
    """A correct cache, except for the `faults`, which may change each reply before it is sent."""

    info: PathInfo
    archive: bytes
    compression: str = "none"
    sigs: tuple[str, ...] = ()
    faults: list[Fault] = field(default_factory=list)
    url: str = ""
    closure: bytes | None = None

    def __post_init__(self) -> None:
        self.sigs = (KEY.sign(self.info.fingerprint("/nix/store")),)

    @property
    def file(self) -> bytes:
        pack: dict[str, Callable[[bytes], bytes]] = {
            "none": bytes,
            "xz": lzma.compress,
            "bzip2": bz2.compress,
            "gzip": lambda data: gzip.compress(data, mtime=0),  # the same bytes each time
            "zstd": lambda data: zstandard.compress(data[:100]) + zstandard.compress(data[100:]),
        }
        return pack[self.compression](self.archive)

    def narinfo(self) -> bytes:
        nar_file = NarFile(NAR, self.compression, hashlib.sha256(self.file).digest(), len(self.file))
        return narinfo.render(self.info, "/nix/store", nar_file, self.sigs).encode()

    def answer(self, question: Question) -> Reply:
        reply = self.right(question)
        for fault in self.faults:
            reply = fault(question, reply)
        return reply

    def right(self, question: Question) -> Reply:
        bodies = {
            "nix-cache-info": b"StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 30\n",
            f"{self.info.path.hash_part}.narinfo": self.narinfo(),
            NAR: self.file,
        }
        if self.closure is not None:
            bodies["nix-cache-info"] += b"ClosureV1: .closure\n"
            bodies[f"{self.info.path.hash_part}.closure"] = self.closure
        body = bodies.get(question.path)
        if body is None:
            return Reply(404, {"cache-control": "no-store"}, b"not found\n")
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        headers = {"cache-control": "public, max-age=31536000, immutable", "etag": etag, "vary": "Accept-Encoding"}
        if question.path != NAR:
            headers["cache-control"] = "public, max-age=86400"
        if question.headers.get("if-none-match") == etag:
            return Reply(304, headers)
        headers["accept-ranges"] = "bytes"
        if part := re.fullmatch(r"bytes=(\d*)-(\d*)", question.headers.get("range", "")):
            start = int(part[1]) if part[1] else len(body) - int(part[2])
            stop = min(int(part[2]) + 1, len(body)) if part[1] and part[2] else len(body)
            if start >= len(body):
                return Reply(416, {"content-range": f"bytes */{len(body)}"})
            headers["content-range"] = f"bytes {start}-{stop - 1}/{len(body)}"
            return Reply(206, headers, body[start:stop])
        accepted = question.headers.get("accept-encoding", "")
        if question.path == NAR and self.compression == "none" and re.search(r"zstd(?!;q=0)", accepted):
            headers |= {"content-encoding": "zstd", "etag": etag[:-1] + '-zstd"'}
            return Reply(200, headers, zstandard.compress(body))
        return Reply(200, headers, body)


class _Handler(QuietHandler):
    cache: Cache

    def do_GET(self) -> None:  # noqa: N802 (name from http.server)
        headers = {name.lower(): value for name, value in self.headers.items()}
        reply = self.cache.answer(Question(self.command, self.path[1:], headers))
        self.send_response_only(reply.status)
        fields = {"date": formatdate(usegmt=True), "content-length": str(len(reply.body)), **reply.headers}
        for name, value in fields.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "GET" and reply.status != 304:
            with suppress(ConnectionError):  # the doctor cuts a download on purpose
                self.wfile.write(reply.body)

    do_HEAD = do_GET  # noqa: N815 (name from http.server)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[PathInfo, bytes]:
    store = StoreBuilder(tmp_path_factory.mktemp("store"))
    info = store.add(store.output_path("sample"), {"file": bytes(range(256)) * 40})
    return info, b"".join(file_reader.read(tree_reader.dump(store.real_path(info.path))))


@pytest.fixture
def cache(sample: tuple[PathInfo, bytes]) -> Iterator[Cache]:
    cache = Cache(*sample)
    with ThreadServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"cache": cache})) as server:
        cache.url = f"http://127.0.0.1:{server.server_port}"
        yield cache


def examined(cache: Cache, samples: Sequence[str] = (), **options: object) -> list[Finding]:
    defaults = {"store_dir": "/nix/store", "count": 3, "demanded": True, "largest": 1 << 20}
    keys = options.pop("keys", [KEY.public_key])
    return list(
        examine(Client(cache.url), samples or [cache.info.path], keys, **{**defaults, **options})  # type: ignore[arg-type]
    )


def problems(findings: Sequence[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level in ("warning", "error")]


def reported(*arguments: str, status: int = 3, **environment: str) -> list[tuple[str, str]]:
    """Return the problems that the command reports, with their remedies."""
    answer = run("doctor", "--json", *arguments, environment={"NETRC": "/nonexistent", **environment})
    assert (answer.returncode, answer.stderr) == (status, "")
    findings = [Finding(**found) for found in json.loads(answer.stdout)["findings"]]
    return [(found.what, found.remedy) for found in problems(findings)]


@pytest.mark.parametrize("compression", ["none", "xz", "bzip2", "gzip", "zstd"])
def test_correct_cache_has_no_problems(cache: Cache, compression: str) -> None:
    cache.compression = compression
    findings = examined(cache)
    assert problems(findings) == []
    checks = {finding.check for finding in findings if finding.level == "ok"}
    assert checks >= {
        "clock", "cache info", "HEAD", "missing paths", "narinfo", "signatures", "NAR", "caching", "ranges", "resume",
        "compression",
    }  # fmt: skip


def on(path: str, method: str | None = None, **changes: object) -> Fault:
    """Change headers, status or body of whole replies for paths with this ending."""

    def fault(question: Question, reply: Reply) -> Reply:
        there = question.path.endswith(path) and not question.path.startswith("0" * 32)
        if there and reply.status == 200 and method in (None, question.method):
            headers = {name.replace("_", "-"): str(value) for name, value in changes.items()}
            status, body = headers.pop("status", reply.status), changes.get("body", reply.body)
            headers.pop("body", None)
            return Reply(int(status), reply.headers | headers, body)  # type: ignore[arg-type]
        return reply

    return fault


def clock(ahead: float) -> Fault:
    def fault(question: Question, reply: Reply) -> Reply:
        return on("info", date=formatdate(time.time() + ahead, usegmt=True))(question, reply)

    return fault


def line(pattern: str, replacement: str) -> Fault:
    def fault(question: Question, reply: Reply) -> Reply:
        if question.path.endswith(".narinfo") and reply.status == 200:
            changed, count = re.subn(pattern, replacement, reply.body.decode())
            assert count
            return replace(reply, body=changed.encode())
        return reply

    return fault


def ranged(change: Callable[[Question, Reply], Reply]) -> Fault:
    return lambda question, reply: change(question, reply) if "range" in question.headers else reply


def missing(status: int, **headers: str) -> Fault:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda _, reply: Reply(status, named, reply.body) if reply.status == 404 else reply


def only_for(method: str, fault: Fault) -> Fault:
    return lambda question, reply: fault(question, reply) if question.method == method else reply


def encoded(change: Callable[[Reply], Reply]) -> Fault:
    return lambda _, reply: change(reply) if reply.headers.get("content-encoding") == "zstd" else reply


def without(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "")


OTHER = SecretKey.generate("good-1").sign(b"decodes to different bytes")

FAULTS: dict[str, tuple[Fault, str, str, str]] = {
    "no cache info": (on("nix-cache-info", status=404), "cache info", "error", "returns 404: clients do not accept"),
    "cache info is forbidden": (on("nix-cache-info", status=403), "cache info", "error", "returns 403"),
    "another store": (on("info", body=b"StoreDir: /gnu/store\n"), "cache info", "error", "/gnu/store"),
    "no store": (on("info", body=b"WantMassQuery: 1\n"), "cache info", "warning", "no StoreDir"),
    "priority": (on("info", body=b"WantMassQuery: 1\nPriority: high\n"), "cache info", "error", "is not a number"),
    "no mass query": (on("info", body=b"StoreDir: /nix/store\n"), "cache info", "warning", "WantMassQuery is not 1"),
    "clock ahead": (clock(900), "clock", "warning", "ahead of ours"),
    "clock behind": (clock(-900), "clock", "warning", "behind ours"),
    "no date": (on("info", date=""), "clock", "warning", "no Date"),
    "missing is 500": (missing(500), "missing paths", "error", "returns 500"),
    "missing is 403": (missing(403), "missing paths", "warning", "returns 403, as on S3"),
    "missing by HEAD is 405": (only_for("HEAD", missing(405)), "missing paths", "error", "404, but HEAD 405"),
    "missing for long": (missing(404, cache_control="max-age=86400"), "missing paths", "warning", "for 86400 s"),
    "no HEAD": (on(".narinfo", "HEAD", status=405), "HEAD", "error", "returns 405, but GET 200"),
    "HEAD tells another length": (on(NAR, "HEAD", content_length=17), "HEAD", "warning", "differ in content-length"),
    "no line end": (line(r"\n\Z", ""), "narinfo", "error", "a line of the narinfo is not `Name: value` with a newline"),
    "no space": (line("Sig: good-1", "Sig:good-1"), "signatures", "warning", "signed by ood-1, whose"),
    "CRLF": (line("\n", "\r\n"), "narinfo", "error", r"malformed URL 'nar/file.nar\r'"),
    "no size": (line("NarSize", "NarSiz"), "narinfo", "error", "the narinfo has no NarSize"),
    "no UTF-8": (on(".narinfo", body=b"\xff"), "narinfo", "error", "can't decode"),
    "another path": (line("-sample", "-other"), "narinfo", "error", "describes"),
    "encoded narinfo": (on(".narinfo", content_encoding="gzip"), "narinfo", "error", "the client did not request"),
    "wrong signature": (line("Sig: .*", f"Sig: {OTHER}"), "signatures", "error", "the signature by good-1 is wrong"),
    "unknown key": (line("Sig: good-1", "Sig: other-1"), "signatures", "warning", "signed by other-1, whose"),
    "unsigned": (line("Sig: ", "Nothing: "), "signatures", "error", "no signature, so clients reject it"),
    "no NAR": (on(NAR, status=404), "NAR", "error", "returns 404, although a narinfo refers to it"),
    "cut NAR": (lambda question, reply: on(NAR, body=reply.body[:-8])(question, reply), "NAR", "error", "ends early"),
    "file size": (line("FileSize: ", "FileSize: 1"), "NAR", "error", "but its narinfo says 1"),
    "file hash": (line("FileHash: .*", f"FileHash: sha256:{'0' * 52}"), "NAR", "error", "does not match the FileHash"),
    "NAR size": (line("NarSize: ", "NarSize: 1"), "NAR", "error", "but its narinfo says 1"),
    "not compressed": (line("Compression: none", "Compression: xz"), "NAR", "error", "is not xz, or damaged"),
    "identity": (on(NAR, content_encoding="identity"), "NAR", "error", "Content-Encoding: identity, which the client"),
    "NAR not cached": (on(NAR, cache_control=""), "caching", "warning", "no Cache-Control"),
    "NAR no-store": (on(NAR, cache_control="no-store"), "caching", "warning", "Cache-Control: no-store"),
    "NAR cached briefly": (on(NAR, cache_control="max-age=60"), "caching", "warning", "for 60 s only"),
    "no validator": (on(NAR, **without("etag")), "caching", "warning", "neither ETag nor Last-Modified"),
    "no 304": (
        lambda _, reply: Reply(200, reply.headers) if reply.status == 304 else reply,
        "caching", "warning", "returns 200 instead of 304",
    ),
    "no ranges": (on(NAR, **without("accept-ranges")), "ranges", "warning", "interrupted downloads fail"),
    "ranges are whole": (
        ranged(lambda _, reply: Reply(200, reply.headers, b"all")), "ranges", "error", "returns 200 instead of 206",
    ),
    "wrong range": (
        ranged(lambda _, reply: replace(reply, body=bytes(len(reply.body)))), "ranges", "error", "returns wrong bytes",
    ),
    "wrong content-range": (
        ranged(lambda _, reply: Reply(reply.status, reply.headers | {"content-range": "bytes 1-2/3"}, reply.body)),
        "ranges", "error", "has Content-Range: bytes 1-2/3",
    ),
    "encoded range": (
        ranged(lambda _, reply: Reply(reply.status, reply.headers | {"content-encoding": "gzip"}, reply.body)),
        "ranges", "error", "has a Content-Encoding",
    ),
    "no 416": (
        ranged(lambda _, reply: Reply(200, {}) if reply.status == 416 else reply), "ranges", "error", "instead of 416",
    ),
    "resumes once": (
        ranged(lambda _, reply: Reply(reply.status, reply.headers | without("accept-ranges"), reply.body)),
        "resume", "warning", "resumes, but only once",
    ),
    "does not resume": (
        ranged(
            lambda question, reply: replace(reply, body=reply.body[::-1])
            if question.headers["range"].endswith("-")
            else reply
        ),
        "resume", "error", "does not resume",
    ),
    "no Vary": (
        encoded(lambda reply: Reply(200, reply.headers | without("vary"), reply.body)),
        "compression", "error", "no Vary",
    ),
    "encoded otherwise": (
        encoded(lambda reply: replace(reply, body=zstandard.compress(b"else"))),
        "compression", "error", "decodes to different bytes",
    ),
    "encoded damaged": (
        encoded(lambda reply: replace(reply, body=reply.body[:-3])), "compression", "error", "different bytes",
    ),
    "not asked for": (
        encoded(lambda reply: Reply(200, reply.headers | {"content-encoding": "br"}, reply.body)),
        "compression", "error", "br was not requested",
    ),
    "one ETag": (on(NAR, etag='"one"'), "compression", "error", "have the same ETag"),
    "q=0": (
        lambda question, reply: Reply(200, reply.headers | {"content-encoding": "zstd"}, reply.body)
        if "q=0" in question.headers.get("accept-encoding", "")
        else reply,
        "compression", "error", "that refuse it with q=0",
    ),
    "uncompressed": (
        encoded(lambda reply: Reply(200, reply.headers | without("content-encoding"), reply.body)),
        "compression", "warning", "sent uncompressed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found_with_its_check_and_a_remedy(cache: Cache, name: str) -> None:
    fault, check, level, said = FAULTS[name]
    cache.faults.append(fault)
    found = problems(examined(cache))
    assert all(finding.remedy for finding in found)
    matching = [finding for finding in found if (finding.check, finding.level) == (check, level)]
    assert any(said in finding.what for finding in matching), found


def test_closure_is_checked_if_it_is_announced(cache: Cache) -> None:
    cache.closure = cache.narinfo()
    found = [finding for finding in examined(cache) if finding.check == "closure"]
    assert [finding.level for finding in found] == ["ok"]
    assert "all 1 narinfos" in found[0].what
    other = cache.narinfo().replace(b"References: ", f"References: {'1' * 32}-other ".encode())
    for closure, level, what in (
        (other, "warning", "1-other is missing in its closure"),
        (b"", "error", "does not end with the narinfo of"),
        (b"nonsense", "error", "narinfo"),
    ):
        cache.closure = closure
        assert [(finding.level, what in finding.what) for finding in problems(examined(cache))] == [(level, True)]
    cache.faults = [on(".closure", status=500)]
    assert "ClosureV1 announces it" in problems(examined(cache))[0].what
    cache.faults = [on(".closure", status=404)]
    assert problems(examined(cache)) == []


@pytest.mark.parametrize("control", ["", "no-store", "max-age=60"])
def test_client_with_a_token_gets_no_advice_for_public_caching(
    cache: Cache, control: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login x password y\n")
    monkeypatch.setenv("NETRC", str(netrc))
    cache.faults.append(on(NAR, cache_control=control))
    [found] = [finding for finding in problems(examined(cache)) if finding.check == "caching"]
    assert "`Cache-Control: private, max-age=31536000, immutable`" in str(found.remedy)


def test_length_that_becomes_known_between_get_and_head_is_no_fault(cache: Cache) -> None:
    cache.faults.append(only_for("GET", on(NAR, content_length="", connection="close")))
    cache.compression = "xz"
    assert not [found for found in examined(cache) if found.check == "HEAD" and found.level != "ok"]


def test_nar_with_another_hash_is_found(cache: Cache) -> None:
    wrong = base32.encode(bytes(32))
    cache.faults.append(line(f"NarHash: sha256:{base32.encode(cache.info.nar_hash)}", f"NarHash: sha256:{wrong}"))
    assert any(f"sha256:{base32.encode(cache.info.nar_hash)}" in found.what for found in problems(examined(cache)))


def test_content_addressed_path_needs_no_signature(cache: Cache) -> None:
    cache.sigs = ()
    cache.info = replace(cache.info, ca=f"fixed:r:sha256:{base32.encode(cache.info.nar_hash)}")
    assert problems(examined(cache)) == []


def test_large_nar_is_skipped_and_reported(cache: Cache) -> None:
    [skipped] = [found for found in examined(cache, largest=100) if found.level == "skipped" and found.check == "NAR"]
    assert "--largest" in skipped.what


def test_unknown_compression_is_skipped(cache: Cache) -> None:
    cache.faults.append(line("Compression: none", "Compression: br"))
    [skipped] = [found for found in examined(cache) if found.level == "skipped" and found.check == "NAR"]
    assert skipped.what == f"{NAR}: this doctor cannot decompress br"


def test_missing_path_is_an_error_if_demanded(cache: Cache) -> None:
    other = "0" * 31 + "1-other"
    [found] = problems(examined(cache, [other]))
    assert (found.level, found.what) == ("error", f"{other} is not in the cache")
    [found] = problems(examined(cache, [other], demanded=False))
    assert (found.check, found.level) == ("samples", "warning")


def test_missing_samples_are_skipped(cache: Cache) -> None:
    findings = examined(cache, ["0" * 31 + "1-other", cache.info.path], demanded=False, count=1)
    assert problems(findings) == []
    assert "NAR" in {finding.check for finding in findings}


def test_interrupted_transfer_is_an_error(cache: Cache) -> None:
    def short(question: Question, reply: Reply) -> Reply:
        if question.path == NAR and question.method == "GET" and reply.status == 200:
            headers = reply.headers | {"content-length": str(len(reply.body) + 5), "connection": "close"}
            return Reply(200, headers, reply.body)
        return reply

    cache.faults.append(short)
    cache.compression = "xz"
    # http.server keeps waiting for a request on the connection, which is closed then.
    assert any("ends early" in found.what or "timed out" in found.what for found in problems(examined(cache)))


@pytest.mark.parametrize("url", ["http://[bad/nar", "ftp://localhost/nar", "http://localhost:x/nar"])
def test_unusable_url_in_a_narinfo_is_an_error(cache: Cache, url: str) -> None:
    cache.faults.append(line("URL: .*", f"URL: {url}"))
    [found] = problems(examined(cache))
    assert (found.check, found.level) == ("NAR", "error")
    assert url[:12] in found.what


def test_redirects_are_followed(cache: Cache) -> None:
    def elsewhere(question: Question, reply: Reply) -> Reply:
        if question.path == "moved.nar":
            return cache.right(replace(question, path=NAR))
        return Reply(302, {"location": "/moved.nar"}) if question.path == NAR else reply

    cache.faults.append(elsewhere)
    assert problems(examined(cache)) == []


def test_unreachable_server_is_one_error_with_a_remedy(tmp_path: Path, new_port: Callable[[], int]) -> None:
    port = new_port()
    (tmp_path / "harmonia.toml").write_text(f"bind = '127.0.0.1:{port}'")
    for arguments in (["doctor", f"http://127.0.0.1:{port}"], ["doctor"]):
        answer = run("--config", str(tmp_path / "harmonia.toml"), *arguments)
        assert answer.returncode == 3
        assert "Connection refused" in answer.stdout
        assert answer.stdout.count("→") == 1


class TestCommand:
    def test_own_server_has_no_problems(self, tmp_path: Path, start: Callable[..., Server]) -> None:
        store = StoreBuilder(tmp_path / "store")
        (tmp_path / "key").write_text(KEY.export())
        (tmp_path / "key").chmod(0o600)
        for name in ("one", "two", "three", "four"):
            store.add(store.output_path(name), {"file": name.encode() * 5000})
        server = start(store=tmp_path / "store", settings=f"sign_key_paths = ['{tmp_path}/key']")
        answer = run("--config", str(server.config), "doctor", server.url)
        assert (answer.returncode, answer.stderr) == (0, "")
        assert "0 errors, 0 warnings" in answer.stdout
        assert answer.stdout.count("hash and size of the NAR are right") == 3
        assert "\x1b" not in answer.stdout

    def test_without_a_url_the_configured_server_is_tested_with_its_keys(
        self, tmp_path: Path, start: Callable[..., Server]
    ) -> None:
        store = StoreBuilder(tmp_path / "store")
        store.add(store.output_path("one"), b"")
        (tmp_path / "key").write_text(KEY.export())
        (tmp_path / "key").chmod(0o600)
        bind = f"unix:{tmp_path}/socket"
        server = start(store=tmp_path / "store", bind=bind, settings=f"sign_key_paths = ['{tmp_path}/key']")
        answer = run("--config", str(server.config), "doctor", "--json")
        assert answer.returncode == 0
        reported = json.loads(answer.stdout)
        assert (reported["url"], reported["ok"]) == (bind, True)
        assert {"check": "signatures", "level": "ok"}.items() <= next(
            found for found in reported["findings"] if found["check"] == "signatures"
        ).items()

    def test_missing_sign_key_is_reported(self, tmp_path: Path, start: Callable[..., Server]) -> None:
        store = StoreBuilder(tmp_path / "store")
        store.add_source("source", b"")
        server = start(store=tmp_path / "store", bind=f"unix:{tmp_path}/socket")
        command = ("--config", str(server.config), "doctor", "--json")
        answer = run(*command)
        [missed] = problems([Finding(**found) for found in json.loads(answer.stdout)["findings"]])
        assert (answer.returncode, missed.level) == (0, "warning")
        assert missed.what.startswith("sign_key_paths is empty")
        assert missed.remedy.startswith("create a key with `harmonia keygen NAME`, and set sign_key_paths")
        store.add(store.output_path("output"), b"")
        answer = run(*command)
        [unsigned] = problems([Finding(**found) for found in json.loads(answer.stdout)["findings"]])
        assert (answer.returncode, unsigned.level) == (3, "error")  # only one finding for one cause

    def test_paths_that_need_a_signature_are_tested_first(self, tmp_path: Path, start: Callable[..., Server]) -> None:
        store = StoreBuilder(tmp_path / "store")
        for number in range(20):
            store.add_source(f"source-{number}", b"")
        built = store.add(store.output_path("output"), b"", keys=[KEY])
        server = start(store=tmp_path / "store", bind=f"unix:{tmp_path}/socket")
        command = ("--config", str(server.config), "doctor", "--public-key", str(KEY.public_key), "--samples", "1")
        reported = json.loads(run(*command, "--json").stdout)["findings"]
        assert f"{built.path}: signed by good-1" in [found["what"] for found in reported]

    def test_store_path_that_the_server_does_not_serve_is_reported(
        self, tmp_path: Path, start: Callable[..., Server]
    ) -> None:
        served = StoreBuilder(tmp_path / "store")
        for name in ("one", "two"):
            served.add_source(name, b"")
        other = StoreBuilder(tmp_path / "other").add_source("other", b"")
        server = start(store=tmp_path / "store", bind=f"unix:{tmp_path}/socket")
        server.config.write_text(server.config.read_text().replace(f"{tmp_path}/store", f"{tmp_path}/other"))
        answer = run("--config", str(server.config), "doctor", "--quiet")
        assert answer.returncode == 3
        assert f"error   narinfo: {other.path} is not in the cache\n" in answer.stdout
        server.config.write_text(server.config.read_text() + "[publish]\nallow = ['nothing']\n")
        answer = run("--config", str(server.config), "doctor", "--quiet")
        assert answer.returncode == 0
        assert "warning samples: found no path that this cache has" in answer.stdout

    def test_errors_are_in_json_and_exit_status(self, cache: Cache) -> None:
        cache.faults.append(missing(500))
        answer = run("doctor", cache.url, str(cache.info.path), "--json", "--public-key", str(KEY.public_key))
        assert answer.returncode == 3
        reported = json.loads(answer.stdout)
        assert not reported["ok"]
        [error] = [found for found in reported["findings"] if found["level"] == "error"]
        assert error["check"] == "missing paths"
        assert error["remedy"].startswith("return 404")

    def test_quiet_prints_only_problems(self, cache: Cache) -> None:
        arguments = ("doctor", cache.url, str(cache.info.path), "--quiet", "--public-key", str(KEY.public_key))
        assert run(*arguments).stdout == ""
        cache.faults.append(on("info", date=""))
        assert run(*arguments).stdout.count("\n") == 2

    def test_trusted_keys_of_nix_conf_are_used(self, cache: Cache, tmp_path: Path) -> None:
        arguments = ("doctor", cache.url, f"/nix/store/{cache.info.path}")
        assert "whose public key is unknown" in run(*arguments).stdout
        (tmp_path / "nix.conf").write_text(f"extra-trusted-public-keys = {KEY.public_key}\n")
        assert "signed by good-1\n" in run(*arguments, environment={"NIX_CONF_DIR": str(tmp_path)}).stdout

    def test_given_key_takes_precedence_over_nix_conf(self, cache: Cache, tmp_path: Path) -> None:
        (tmp_path / "nix.conf").write_text(f"extra-trusted-public-keys = {SecretKey.generate('good-1').public_key}\n")
        arguments = ("doctor", cache.url, f"/nix/store/{cache.info.path}", "--public-key", str(KEY.public_key))
        assert "signed by good-1\n" in run(*arguments, environment={"NIX_CONF_DIR": str(tmp_path)}).stdout


@needs("openssl")
class TestTLS:
    @pytest.fixture
    def certificate(self, tmp_path: Path) -> Callable[..., str]:
        """Return a function that makes a certificate for some days and a name, and returns the settings for it."""

        def make(days: int, name: str = "IP:127.0.0.1") -> str:
            files = {kind: tmp_path / f"{kind}.pem" for kind in ("key", "request", "cert")}
            (tmp_path / "names").write_text(f"subjectAltName={name}")
            request = "openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=localhost"
            request += f" -keyout {files['key']} -out {files['request']}"
            sign = f"openssl x509 -req -signkey {files['key']} -in {files['request']} -out {files['cert']}"
            sign += f" -days {days} -extfile {tmp_path}/names"
            for command in (request, sign):
                subprocess.run(command.split(), capture_output=True, check=True)
            files["key"].chmod(0o600)
            return f"tls_cert_path = '{files['cert']}'\ntls_key_path = '{files['key']}'"

        return make

    @pytest.mark.parametrize(("days", "level"), [(90, "ok"), (5, "warning")])
    def test_remaining_days_of_the_certificate_are_reported(
        self,
        tmp_path: Path,
        start: Callable[..., Server],
        certificate: Callable[..., str],
        days: int,
        level: str,
    ) -> None:
        StoreBuilder(tmp_path / "store")
        server = start(store=tmp_path / "store", settings=certificate(days))
        trusted = {"NIX_SSL_CERT_FILE": str(tmp_path / "cert.pem")}
        answer = run("--config", str(server.config), "doctor", server.url, environment=trusted)
        assert answer.returncode == 0
        assert re.search(rf"(?m)^{level} +TLS: the certificate is trusted, and valid for \d+ more days$", answer.stdout)

    def test_untrusted_certificate_is_reported(
        self, tmp_path: Path, start: Callable[..., Server], certificate: Callable[..., str]
    ) -> None:
        StoreBuilder(tmp_path / "store")
        server = start(store=tmp_path / "store", settings=certificate(90))
        answer = run("doctor", server.url)
        assert answer.returncode == 3
        assert "its certificate is not trusted" in answer.stdout
        assert "NIX_SSL_CERT_FILE" in answer.stdout

    def test_expired_certificate_is_reported(
        self, tmp_path: Path, start: Callable[..., Server], certificate: Callable[..., str]
    ) -> None:
        StoreBuilder(tmp_path / "store")
        server = start(store=tmp_path / "store", settings=certificate(-1))
        [(what, remedy)] = reported(server.url, NIX_SSL_CERT_FILE=str(tmp_path / "cert.pem"))
        assert what.endswith("certificate has expired")
        assert remedy.startswith("renew it, then reload the server")

    def test_certificate_is_checked_for_the_name_in_base_url(
        self,
        tmp_path: Path,
        start: Callable[..., Server],
        certificate: Callable[..., str],
        new_port: Callable[[], int],
    ) -> None:
        StoreBuilder(tmp_path / "store")
        settings = certificate(90, "DNS:cache.example.org")
        server = start(store=tmp_path / "store", bind=f"127.0.0.1:{new_port()}", settings=settings)
        trusted = {"NIX_SSL_CERT_FILE": str(tmp_path / "cert.pem")}
        answer = run("--config", str(server.config), "doctor", environment=trusted)
        assert "not valid for '127.0.0.1'" in answer.stdout
        assert "or in base_url" in answer.stdout
        config = f"base_url = 'https://cache.example.org/nix'\n{server.config.read_text()}"
        server.config.write_text(config)
        answer = run("--config", str(server.config), "doctor", environment=trusted)
        assert "TLS: the certificate is trusted" in answer.stdout, answer.stdout

    def test_wrong_scheme_is_reported_with_the_right_url(
        self,
        tmp_path: Path,
        start: Callable[..., Server],
        certificate: Callable[..., str],
        new_port: Callable[[], int],
    ) -> None:
        StoreBuilder(tmp_path / "store")
        ours = start(store=tmp_path / "store", settings=certificate(90)).url
        pair = f"ssl_certificate {tmp_path}/cert.pem; ssl_certificate_key {tmp_path}/key.pem;"
        port = new_port()
        with nginx(tmp_path / "nginx", "", f"server {{ listen 127.0.0.1:{port} ssl; {pair} }}") as (plain, _):
            for url in (ours, f"https://127.0.0.1:{port}"):
                [(_, remedy)] = reported(url.replace("https", "http"))
                assert remedy == f"the server uses TLS: use {url}"
            [(_, remedy)] = reported(plain.replace("http", "https"))
            assert remedy == "if that port serves plain HTTP, use http://"


class TestUnusableCacheIsOneFinding:
    def test_private_cache_without_a_token(self, tmp_path: Path, start: Callable[..., Server]) -> None:
        StoreBuilder(tmp_path / "store")
        (tmp_path / "tokens").write_text(str(tokens.new("all", ["read"])[1]))
        url = start(store=tmp_path / "store", settings=f"tokens_path = '{tmp_path}/tokens'").url
        [(what, remedy)] = reported(url)
        assert what.startswith("nix-cache-info returns 401")
        assert remedy.startswith("add a token to /etc/nix/netrc, or to the file of $NETRC")
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login x password y\n")
        [(_, remedy)] = reported(url, NETRC=str(tmp_path / "netrc"))
        assert remedy.startswith("replace the token for 127.0.0.1 in the netrc")

    def test_proxy_without_a_server(self, tmp_path: Path, new_port: Callable[[], int]) -> None:
        with nginx(tmp_path / "nginx", f"location / {{ proxy_pass http://127.0.0.1:{new_port()}; }}") as (url, _):
            [(what, remedy)] = reported(url)
        assert what.startswith("nix-cache-info returns 502")
        assert remedy.startswith("check that the server behind the proxy runs")

    def test_login_page_instead_of_nix_cache_info_is_an_error(self, tmp_path: Path) -> None:
        page = "<!doctype html><title>Log in</title>"
        with nginx(tmp_path / "nginx", f"default_type text/html; location / {{ return 200 '{page}'; }}") as (url, _):
            [(what, remedy)] = reported(url)
        assert what.startswith("nix-cache-info is a web page")
        assert "a login page must not intercept" in remedy

    def test_wrong_path_in_the_url(self, tmp_path: Path, start: Callable[..., Server]) -> None:
        StoreBuilder(tmp_path / "store")
        [(what, remedy)] = reported(start(store=tmp_path / "store").url + "/nix")
        assert what.startswith("nix-cache-info returns 404")
        assert remedy.startswith("check the URL and its path")

    def test_cache_of_another_store_directory(self, tmp_path: Path, start: Callable[..., Server]) -> None:
        info = StoreBuilder(tmp_path / "store", store_dir="/gnu/store").add_source("source", b"")
        url = start(store=tmp_path / "store", settings="virtual_nix_store = '/gnu/store'").url
        [(what, remedy)] = reported(url, info.path)
        assert what == "the cache is for the store /gnu/store, not /nix/store"
        assert "with --store-dir /gnu/store" in remedy


def test_problem_of_all_paths_is_reported_once(tmp_path: Path, start: Callable[..., Server]) -> None:
    store = StoreBuilder(tmp_path / "store")
    paths = [store.add_source(name, b"").path for name in ("one", "two", "three")]
    server = start(store=tmp_path / "store", settings="enable_compression = false")
    [(what, _)] = reported(server.url, *paths, status=0)
    assert what.endswith("is sent uncompressed")
    forbidden = f"if ($request_method = HEAD) {{ return 405; }} location / {{ proxy_pass {server.url}; }}"
    with nginx(tmp_path / "nginx", forbidden) as (url, _):
        found = [what for what, _ in reported(url, *paths)]
    assert len(found) == 3
    assert found[:2] == ["HEAD of nix-cache-info returns 405, but GET 200", "GET returns 404, but HEAD 405"]


def test_missing_range_support_is_one_finding(cache: Cache) -> None:
    cache.faults.append(ranged(lambda question, _: cache.right(replace(question, headers={}))))
    [found] = problems(examined(cache))
    assert found.what.count("returns 200 instead") == 4


class TestDamageIsOneFinding:
    @pytest.mark.parametrize(("compressed", "size"), [(True, 8), (False, 8), (False, 1 << 19)])
    def test_damaged_store_object(
        self, tmp_path: Path, start: Callable[..., Server], *, compressed: bool, size: int
    ) -> None:
        store = StoreBuilder(tmp_path / "store")
        info = store.add(store.output_path("output"), {"file": b"c" * size}, keys=[KEY])
        file = Path(os.fsdecode(store.real_path(info.path))) / "file"
        file.chmod(0o600)
        file.write_bytes(b"C" * size)
        server = start(store=tmp_path / "store", settings=f"enable_compression = {str(compressed).lower()}")
        arguments = (server.url, info.path, "--public-key", str(KEY.public_key))
        [damage] = [each for each in reported(*arguments) if "uncompressed" not in each[0]]
        what, remedy = damage
        if compressed or size < 1 << 18:  # the server knows the hash before it sends
            assert "returns 404, although a narinfo refers to it" in what
            assert f"harmonia verify {info.path};" in remedy
        else:
            assert what.startswith("the NAR hash is sha256:")
            assert "nix-store --repair-path" in remedy


def test_mistyped_name_of_a_path_is_suggested(cache: Cache) -> None:
    [found] = problems(examined(cache, [cache.info.path + "s"]))
    assert f"describes {cache.info.path}" in found.what
    assert found.remedy.startswith("if you meant that path, pass its name")


@pytest.mark.nix
@pytest.mark.parametrize("compression", ["xz", "zstd", "none"])
def test_cache_made_by_nix_and_served_by_nginx_has_no_errors(tmp_path: Path, compression: str) -> None:
    store = StoreBuilder(tmp_path / "store")
    info = store.add(store.output_path("output"), {"file": b"contents" * 1000}, keys=[KEY])
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "NIX_CONFIG": "experimental-features = nix-command",
    }
    stores = ("--from", f"local?root={tmp_path}/store", "--to", f"file://{tmp_path}/cache?compression={compression}")
    copy = ["nix", "copy", "--no-check-sigs", *stores, f"/nix/store/{info.path}"]
    subprocess.run(copy, env=environment, check=True, capture_output=True)
    with nginx(tmp_path / "nginx", f"root {tmp_path}/cache;") as (url, _):
        answer = run("doctor", url, f"/nix/store/{info.path}", "--public-key", str(KEY.public_key))
    assert answer.returncode == 0, answer.stdout
    for said in ("signed by good-1", "hash and size of the NAR are right", "byte ranges are right", "no Cache-Control"):
        assert said in answer.stdout


@pytest.mark.parametrize("command", ["doctor", "top"])
@pytest.mark.parametrize(
    "url", ["no where", "ftp://localhost", "/nix/store", "http://[::", "http://x:y", "http://a..b", "unix:"]
)
def test_malformed_url_is_a_usage_error(command: str, url: str) -> None:
    answer = run(command, url)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert f"'{url}' is not a URL like http://" in answer.stderr


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("5000", "http://localhost:5000"),
        (":5000", "http://localhost:5000"),
        ("localhost", "http://localhost"),
        ("localhost:5000", "http://localhost:5000"),
        ("[::1]:5000/nix/", "http://[::1]:5000/nix"),
        ("192.0.2.1", "http://192.0.2.1"),
        ("cache.example.org", "https://cache.example.org"),
        ("cache.example.org/nix", "https://cache.example.org/nix"),
        ("cache.example.org:8443", "https://cache.example.org:8443"),
        ("cache.example.org:8080", "http://cache.example.org:8080"),
        ("unix:/run/harmonia/socket", "unix:/run/harmonia/socket"),
    ],
)
def test_url_without_a_scheme_is_completed(given: str, url: str) -> None:
    assert Client(given).url == url


def test_path_of_a_socket_is_accepted_as_url(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{tmp_path}/socket")
        assert Client(f"{tmp_path}/socket").url == f"unix:{tmp_path}/socket"


@pytest.mark.parametrize("command", ["doctor", "top"])
def test_url_with_a_password_is_rejected_and_not_shown(command: str) -> None:
    answer = run(command, "http://me:sesame@localhost:5000")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert "machine localhost login USER password PASSWORD" in answer.stderr
    assert "sesame" not in answer.stderr


def test_url_with_non_ascii_characters_is_encoded(cache: Cache) -> None:
    asked: list[str] = []

    def note(question: Question, reply: Reply) -> Reply:
        asked.append(question.path)
        return reply

    cache.faults.append(note)
    assert run("doctor", f"{cache.url}/ä").returncode == 3
    assert "%C3%A4/nix-cache-info" in asked


@pytest.mark.parametrize("command", ["doctor", "top"])
@pytest.mark.parametrize("content", [None, "no PEM"])
def test_unreadable_certificates_are_a_usage_error(tmp_path: Path, command: str, content: str | None) -> None:
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_text(content)
    environment = {"NIX_SSL_CERT_FILE": str(file)}
    answer = run(command, "https://127.0.0.1:1", environment=environment)
    assert (answer.returncode, answer.stdout) == (2, "")
    reported = (
        f"harmonia: environment variable NIX_SSL_CERT_FILE: cannot read '{file}': .*; name a file .*, or unset it\n"
    )
    assert re.fullmatch(reported, answer.stderr)
    assert "NIX_SSL_CERT_FILE" not in run(command, "http://127.0.0.1:1", environment=environment).stderr


def test_malformed_path_is_a_usage_error() -> None:
    answer = run("doctor", "http://127.0.0.1:1", "./result")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.startswith("harmonia: PATH './result': expected a store path like /nix/store/<hash>-<name>")

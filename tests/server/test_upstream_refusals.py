"""A refused response of an upstream is a 404, a count, and one log message with cause and remedy."""

import gzip
import hashlib
import http.client
import lzma
import re
import ssl
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from harmonia.metrics.shared_counters import Metrics
from harmonia.nix.narinfo import NarFile
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey
from harmonia.tools.store_builder import StoreBuilder
from harmonia.upstream import refusals
from harmonia.upstream.refusals import Reason
from support.certificates import authority, issue
from support.programs import needs
from support.proxy_server import ProxyServer
from support.running import NO_CACHE, Server, patched, wait_until
from support.upstream_server import Behaviour, Handler, UpstreamServer, file_url, hang, status

Start = Callable[..., Server]

KEY = SecretKey.generate("upstream-1")
CACHE = "cache.test"  # a reserved name that DNS does not have (RFC 6761)
DOCS = Path(__file__).parents[2] / "docs"
TIMES = 3
ALWAYS_LOGGED = patched("from harmonia.upstream import refusals; refusals._LOG_INTERVAL_S = 0.0")


@dataclass
class Far:
    """A path that only the upstream has."""

    info: PathInfo
    nar: NarFile
    file: bytes

    @property
    def narinfo(self) -> str:
        return f"/{self.info.path.hash_part}.narinfo"


@pytest.fixture
def upstream() -> Iterator[UpstreamServer]:
    with UpstreamServer() as upstream:
        yield upstream


@pytest.fixture
def paths(upstream: UpstreamServer, tmp_path: Path) -> list[Far]:
    """Add many paths to the upstream, because each response is cached."""
    far = StoreBuilder(tmp_path / "far")
    made = []
    for number in range(30):
        content = f"far {number}\n".encode()
        words = (b"nix-archive-1", b"(", b"type", b"regular", b"contents", content, b")")
        nar = b"".join(len(word).to_bytes(8, "little") + word + bytes(-len(word) % 8) for word in words)
        file = lzma.compress(nar)
        digest = hashlib.sha256(file).digest()
        info = far.add_text(f"far-{number}", content)
        made.append(Far(info, NarFile(file_url(digest, ".xz"), "xz", digest, len(file)), file))
        add_to(upstream, made[-1])
    return made


def add_to(upstream: UpstreamServer, path: Far, *keys: SecretKey, **changed: object) -> None:
    """Add the path to the upstream, with a changed narinfo."""
    upstream.add(path.info, path.file, replace(path.nar, **changed), keys=keys or (KEY,))  # type: ignore[arg-type]


@pytest.fixture
def begin(start: Start, tmp_path: Path) -> Start:
    StoreBuilder(tmp_path / "store").add_text("here", b"here\n")

    def begin(url: str, *more: str, wait_until_up: bool = True, signed: bool = True, **options: object) -> Server:
        keys = [f"public_keys = ['{KEY.public_key}']"] if signed else []
        settings = "\n".join(("upstream_timeout = 20.0", "[[upstream]]", f"url = '{url}'", *keys, *more))
        server = start(store=tmp_path / "store", settings=settings, workers=1, **options)
        if wait_until_up:
            wait_until(lambda: f"upstream {url}: up" in server.get("/health?verbose").text)
        return server

    return begin


def count(server: Server, reason: Reason) -> float:
    families = {family.name: family for family in text_string_to_metric_families(server.get("/metrics").text)}
    samples = families["harmonia_upstream_refused"].samples
    return sum(sample.value for sample in samples if sample.labels["reason"] == reason)


def is_counted(server: Server, reason: Reason, times: int) -> bool:
    return count(server, reason) == times


def lines(server: Server, reason: Reason) -> list[str]:
    return [line for line in server.log if f"({reason})" in line]


def assert_noted(server: Server, reason: Reason, times: int, cause: str) -> None:
    """Check that the refusal was counted, and logged once, with cause and remedy."""
    wait_until(lambda: count(server, reason) == times)
    server.wait_for_log(re.escape(f"({reason})"))
    (line,) = lines(server, reason)
    assert re.search(cause, line), line
    assert f"; {reason.remedy} ({reason})" in line
    assert "WARNING upstream http" in line
    assert not [each for each in server.log if "Traceback" in each]


def assert_last_noted(server: Server, reason: Reason, times: int, cause: str) -> None:
    """Check that a refusal was counted and logged, by a server that logs every refusal."""
    server.wait_for_log(f"{cause}.*; {re.escape(f'{reason.remedy} ({reason})')}")
    wait_until(lambda: count(server, reason) == times)


# Narinfos


def body(content: bytes, **headers: str) -> Behaviour:
    return lambda handler: handler.answer(200, content, {k.replace("_", "-"): v for k, v in headers.items()})


def redirect(location: str) -> Behaviour:
    """Redirect to a URL, in which {path} stands for the path of the request."""
    return lambda handler: status(302, Location=location.format(path=handler.path))(handler)


def changed(old: bytes, new: bytes) -> Behaviour:
    """Answer with the file, with one replacement."""
    return lambda handler: handler.answer(200, handler.server.files[handler.path].replace(old, new))


def another_narinfo(handler: Handler) -> None:
    """Answer with the narinfo of another path."""
    others = [path for path in handler.server.files if path.endswith(".narinfo") and path != handler.path]
    handler.answer(200, handler.server.files[others[0]])


EMPTY_STREAMS = gzip.compress(b"") * ((2 << 20) // len(gzip.compress(b"")))

NARINFOS: dict[str, tuple[Reason, Behaviour, str]] = {
    "another host": (Reason.REDIRECT_ELSEWHERE, redirect("http://other.test:8/x?secret"), "'http://other.test:8'"),
    "another port": (Reason.REDIRECT_ELSEWHERE, redirect("http://127.0.0.1:1/x"), "another host"),
    "https at another port": (Reason.REDIRECT_ELSEWHERE, redirect("https://127.0.0.1:1/x"), "another host"),
    "https at another host": (Reason.REDIRECT_ELSEWHERE, redirect("https://127.0.0.2/x"), "another host"),
    "ftp": (Reason.REDIRECT_MALFORMED, redirect("ftp://127.0.0.1/x"), "malformed redirect to 'ftp://127.0.0.1/x'"),
    "no URL": (Reason.REDIRECT_MALFORMED, redirect("http://[x/"), "malformed redirect to "),
    "no port": (Reason.REDIRECT_MALFORMED, redirect("http://127.0.0.1:99999/"), "malformed redirect to "),
    "a circle": (Reason.TOO_MANY_REDIRECTS, redirect("{path}"), "more than 5 redirects"),
    "too long": (Reason.TOO_LONG, body(bytes((2 << 20) + 1)), "longer than 2097152 bytes"),
    "too long decoded": (
        Reason.TOO_LONG,
        body(gzip.compress(bytes((2 << 20) + 1)), Content_Encoding="gzip"),
        "after decoding its Content-Encoding: .*longer than 2097152 bytes",
    ),
    "empty streams": (Reason.TOO_LONG, body(EMPTY_STREAMS, Content_Encoding="gzip"), "more than 4096 pieces"),
    "an unknown coding": (Reason.ENCODING, body(b"x", Content_Encoding="rot13"), "'rot13' is unknown"),
    "a wrong coding": (Reason.ENCODING, body(b"x" * 99, Content_Encoding="br"), "invalid Content-Encoding"),
    "cut short": (Reason.ENCODING, body(gzip.compress(b"x")[:-1], Content_Encoding="gzip"), "it is cut short"),
    "a page": (Reason.MALFORMED_NARINFO, body(b"<!doctype html>\n<title>Sign in</title>\n"), "narinfo"),
    "bytes": (Reason.MALFORMED_NARINFO, body(b"\xff\0"), "narinfo"),
    "nothing": (Reason.MALFORMED_NARINFO, body(b""), "the narinfo has no StorePath"),
    "another path": (Reason.WRONG_PATH, another_narinfo, "the narinfo is for another path"),
    "another store": (Reason.WRONG_STORE_DIR, changed(b"/nix/store", b"/gnu/store"), "not in the store /nix/store"),
    "other references": (Reason.NOT_SIGNED, changed(b"NarSize: ", b"NarSize: 1"), "no signature by any of public_keys"),
    "an unknown compression": (
        Reason.COMPRESSION,
        changed(b": xz", b": lz4"),
        "cannot verify NARs with the compression lz4",
    ),
    "a URL of another kind": (Reason.URL_MALFORMED, changed(b"URL: nar/", b"URL: ftp://x/"), "malformed URL 'ftp://x/"),
    "a URL without a port": (Reason.URL_MALFORMED, changed(b"URL: nar/", b"URL: http://x:99999/"), "malformed URL "),
}


def test_refused_narinfo_gets_404_and_is_logged_with_cause_and_remedy(
    begin: Start, upstream: UpstreamServer, paths: list[Far]
) -> None:
    server = begin(upstream.url, program=ALWAYS_LOGGED)
    times = Counter[Reason]()
    for path, (reason, behaviour, cause) in zip(paths, NARINFOS.values(), strict=False):
        upstream.behaviours[path.narinfo] = behaviour
        assert server.get(path.narinfo).status == 404
        times[reason] += 1
        assert_last_noted(server, reason, times[reason], cause)
    assert "secret" not in "".join(server.log)


def test_refusals_are_logged_once_for_each_reason_and_counted_each_time(
    begin: Start, upstream: UpstreamServer, paths: list[Far]
) -> None:
    server = begin(upstream.url)
    chosen = [NARINFOS[case] for case in ("another host", "too long", "cut short", "a page", "other references")]
    for number, path in enumerate(paths[: TIMES * len(chosen)]):
        upstream.behaviours[path.narinfo] = chosen[number % len(chosen)][1]
        assert server.get(path.narinfo).status == 404
    for reason, _, cause in chosen:
        assert_noted(server, reason, TIMES, cause)


def test_nar_url_on_another_host_is_refused_without_public_keys(
    begin: Start, upstream: UpstreamServer, paths: list[Far]
) -> None:
    upstream.behaviours["narinfo"] = changed(b"URL: nar/", b"URL: http://other.test/nar/")
    server = begin(upstream.url, signed=False)
    for path in paths[:TIMES]:
        assert server.get(path.narinfo).status == 404
    assert_noted(server, Reason.URL_ELSEWHERE, TIMES, "leads to another host")


@pytest.mark.parametrize("case", ["another host", "a page"])
def test_next_upstream_is_used_after_a_refusal(
    begin: Start, upstream: UpstreamServer, paths: list[Far], case: str
) -> None:
    reason, behaviour, _ = NARINFOS[case]
    with UpstreamServer() as other:
        for path in paths:
            add_to(other, path)
        upstream.behaviours["narinfo"] = behaviour
        second = f"priority = 1\n[[upstream]]\nurl = '{other.url}'\npublic_keys = ['{KEY.public_key}']\npriority = 2"
        server = begin(upstream.url, second)
        wait_until(lambda: f"upstream {other.url}: up" in server.get("/health?verbose").text)
        for path in paths[:TIMES]:
            assert server.get(path.narinfo).status == 200
    assert count(server, reason) == TIMES
    assert len(lines(server, reason)) == 1


def test_requests_beyond_the_concurrency_limit_are_counted(
    begin: Start, upstream: UpstreamServer, paths: list[Far]
) -> None:
    upstream.behaviours["narinfo"] = hang
    one = patched("from harmonia.upstream import client; client._MAX_SMALL_REQUESTS = 1")
    server = begin(upstream.url, "timeout = 0.5", program=one)
    with ThreadPoolExecutor(TIMES) as threads:
        assert {answer.status for answer in threads.map(lambda path: server.get(path.narinfo), paths[:TIMES])} == {404}
    wait_until(lambda: count(server, Reason.BUSY) >= 1)
    server.wait_for_log("other requests were pending for 0.5 s")


# NARs


NARS: dict[str, tuple[Reason, Behaviour, str]] = {
    "missing": (Reason.MISSING_NAR, status(404), "which does not exist"),
    "other content": (Reason.WRONG_NAR, body(lzma.compress(b"other")), "another NarHash"),
    "garbage": (Reason.WRONG_NAR, body(b"garbage" * 9), "not xz data"),
    "bomb": (Reason.WRONG_NAR, body(lzma.compress(bytes(1 << 20))), "longer than its NarSize"),
    "cut": (Reason.WRONG_NAR, body(lzma.compress(b"other")[:-4]), "truncated"),
    "redirect": (Reason.REDIRECT_MALFORMED, redirect("ftp://127.0.0.1/x"), "malformed redirect to 'ftp:"),
    "a circle": (Reason.TOO_MANY_REDIRECTS, redirect("{path}"), "more than 5 redirects"),
    "coding": (Reason.ENCODING, body(b"x", Content_Encoding="rot13"), "'rot13' is unknown"),
    "wrong coding": (Reason.ENCODING, body(b"x" * 99, Content_Encoding="br"), "invalid Content-Encoding"),
}


@pytest.mark.parametrize("with_cache", [True, False])
def test_refused_nar_is_logged_with_cause_and_remedy(
    begin: Start, upstream: UpstreamServer, paths: list[Far], *, with_cache: bool
) -> None:
    server = begin(upstream.url, program=ALWAYS_LOGGED, cache_dir=None if with_cache else NO_CACHE)
    times = Counter[Reason]()
    for path, (reason, behaviour, cause) in zip(paths, NARS.values(), strict=False):
        add_to(upstream, path, file_hash=None)
        url = nar_url(server, path)
        upstream.behaviours[path.nar.url] = behaviour
        assert is_refused(server, url)
        times[reason] += 1
        assert_last_noted(server, reason, times[reason], cause)


def is_refused(server: Server, url: str) -> bool:
    try:
        return server.get(url).status == 404
    except (http.client.IncompleteRead, ConnectionError):
        return True


def nar_url(server: Server, path: Far) -> str:
    answer = server.get(path.narinfo)
    assert answer.status == 200, server.log
    url = re.search("^URL: (.*)$", answer.text, re.MULTILINE)
    assert url
    return f"/{url[1]}"


def test_nar_with_too_large_a_window_is_refused(begin: Start, upstream: UpstreamServer, paths: list[Far]) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 24}]
    file = lzma.compress(b"other", filters=filters)
    for path in paths[:TIMES]:
        add_to(upstream, path, file_hash=None)
    small = patched("from harmonia.process import threads\nthreads.MEMORY_BYTES = threads.LARGE_MEMORY_BYTES = 1 << 20")
    server = begin(upstream.url, program=small)
    urls = [nar_url(server, path) for path in paths[:TIMES]]
    upstream.behaviours["^/nar/"] = body(file)
    for url in urls:
        assert is_refused(server, url)
    assert_noted(server, Reason.COMPRESSION, TIMES, "a window of this xz file is too large")


def test_nar_with_a_large_window_is_verified_without_a_cache_directory(
    begin: Start, upstream: UpstreamServer, paths: list[Far]
) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 24}]
    small = patched("from harmonia.nix.nar_check import NarCheck\nNarCheck.__init__.__defaults__ = (1 << 20,)")
    server = begin(upstream.url, program=small, cache_dir=NO_CACHE)
    for path in paths[:2]:  # the second NAR needs the memory that the first released
        file = lzma.compress(lzma.decompress(path.file), filters=filters)
        add_to(upstream, replace(path, file=file), file_hash=hashlib.sha256(file).digest(), file_size=len(file))
        assert server.get(nar_url(server, path)).body == file


def test_redirect_of_a_nar_from_a_public_upstream_to_a_private_address_is_refused(
    begin: Start, upstream: UpstreamServer, paths: list[Far]
) -> None:
    """127.0.0.1 counts as public here."""
    outside = patched(
        "from harmonia.upstream import address_filter as filter; filter.is_public = lambda host: host != '127.0.0.2'"
    )
    upstream.behaviours["^/nar/"] = redirect("http://127.0.0.2:7/secret")
    server = begin(upstream.url, program=outside)
    for path in paths[:TIMES]:
        assert server.get(nar_url(server, path)).status == 404
    assert_noted(
        server, Reason.PRIVATE_ADDRESS, TIMES, "'http://127.0.0.2:7': a public upstream leads to a private address"
    )
    assert "secret" not in "".join(server.log)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_error_of_the_proxy_is_logged(begin: Start, upstream: UpstreamServer, paths: list[Far], scheme: str) -> None:
    def password_needed(handler: Handler) -> None:
        upstream.files["/nix-cache-info"] = b""  # /nix-cache-info works, so that the probe is not counted
        status(407, Proxy_Authenticate="Basic")(handler)

    with ProxyServer() as proxy:
        proxy.places[CACHE] = ("127.0.0.1", upstream.server_port)
        server = begin(f"http://{CACHE}", f"proxy = '{proxy.url}'")
        upstream.behaviours["^/nar/"] = redirect(f"{scheme}://bucket.test/x")
        if scheme == "http":
            upstream.behaviours["^/nar/"] = password_needed
        for path in paths[:2]:
            assert server.get(nar_url(server, path)).status == 404
        cause = "'https://bucket.test:443': status 502 from the proxy" if scheme == "https" else "status 407"
        assert_noted(server, Reason.PROXY, 2, cause)


# Realisations and debug info


DRV = "0" * 32 + "-far.drv"
NO_JSON = [b"", b"no JSON", b"[]", b"{}", b"null", b'{"outPath":1,"archive":[1],"member":1}', b"[" * 100_000]


@pytest.mark.parametrize("resource", ["realisations/sha256:{}!out.doi", "build-trace-v2/{}/out.doi", "debuginfo/{}"])
def test_malformed_json_is_refused(begin: Start, upstream: UpstreamServer, resource: str) -> None:
    server = begin(upstream.url)
    bodies = NO_JSON[1:] if "debuginfo" in resource else NO_JSON
    for times, content in enumerate(bodies, 1):
        upstream.behaviours["^/(real|build|debug)"] = body(content)
        name = DRV if "trace" in resource else ("0" * 40 if "debug" in resource else "0" * 64)
        assert server.get("/" + resource.format(name)).status == 404, content
        wait_until(partial(is_counted, server, Reason.MALFORMED_JSON, times))
    assert_noted(server, Reason.MALFORMED_JSON, len(bodies), "not the JSON of this resource")
    upstream.behaviours["^/(real|build|debug)"] = body(b" " * (256 << 10) + b"{}")
    assert server.get("/" + resource.format(name)).status == 404
    assert_noted(server, Reason.TOO_LONG, 1, "longer than 262144 bytes")


def test_debug_info_with_a_url_on_another_host_is_refused(begin: Start, upstream: UpstreamServer) -> None:
    server = begin(upstream.url)
    for archive in ("http://other.test/nar/x", "../secret", "../nar/../x"):
        upstream.behaviours["^/debug"] = body(b'{"archive": "%s", "member": "m"}' % archive.encode())
        assert server.get(f"/debuginfo/{'0' * 40}").status == 404
    assert_noted(server, Reason.URL_ELSEWHERE, 3, "leads to 'http://other.test/nar/x'")


# Redirects between http and https


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[UpstreamServer]:
    """Start the same site with TLS, for clients that trust ca.pem."""
    authority(tmp_path, "ca")
    certificate = issue(tmp_path, "ca", CACHE)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with UpstreamServer() as secured:
        secured.socket = context.wrap_socket(secured.socket, server_side=True, do_handshake_on_connect=False)
        yield secured


@pytest.fixture
def proxy(upstream: UpstreamServer, secured: UpstreamServer) -> Iterator[ProxyServer]:
    """Start a proxy that gives the site the default ports of http and https."""
    with ProxyServer() as proxy:
        proxy.places[CACHE] = ("127.0.0.1", upstream.server_port)
        proxy.places[f"{CACHE}:443"] = ("127.0.0.1", secured.server_port)
        yield proxy


def moved(handler: Handler) -> None:
    """Serve the target of the plain site's redirects."""
    assert handler.path.startswith("/moved/")
    assert handler.path.endswith("?to=https")
    handler.path = handler.path.removeprefix("/moved").removesuffix("?to=https")
    handler.serve()


@needs("openssl")
def test_redirect_to_https_on_the_same_host_is_followed_with_the_password(
    begin: Start,
    upstream: UpstreamServer,
    secured: UpstreamServer,
    proxy: ProxyServer,
    tmp_path: Path,
    paths: list[Far],
) -> None:
    (tmp_path / "password").write_text("me:sesame\n")
    (tmp_path / "password").chmod(0o600)
    upstream.behaviours["."] = redirect(f"https://{CACHE}/moved{{path}}?to=https")
    secured.files |= upstream.files
    secured.files[f"/log/{DRV}"] = b"built"
    secured.behaviours["."] = moved
    more = (f"credentials_file = '{tmp_path}/password'", f"ca_file = '{tmp_path}/ca.pem'", f"proxy = '{proxy.url}'")
    server = begin(f"http://{CACHE}", *more)
    assert server.get(nar_url(server, paths[0])).body == paths[0].file
    assert server.get(f"/log/{DRV}").body == b"built"
    assert all(headers["Authorization"].startswith("Basic ") for headers in secured.headers)
    assert not [line for line in server.log if "refused" in line]


@needs("openssl")
def test_redirect_to_https_with_an_untrusted_certificate_gets_no_password(
    begin: Start, upstream: UpstreamServer, secured: UpstreamServer, proxy: ProxyServer
) -> None:
    upstream.behaviours["."] = redirect(f"https://{CACHE}{{path}}")
    server = begin(f"http://{CACHE}", f"proxy = '{proxy.url}'", wait_until_up=False)
    server.wait_for_log("cannot be used: its TLS certificate is not trusted")
    assert not secured.headers


@needs("openssl")
def test_redirect_from_https_to_http_is_refused(
    begin: Start,
    upstream: UpstreamServer,
    secured: UpstreamServer,
    proxy: ProxyServer,
    tmp_path: Path,
    paths: list[Far],
) -> None:
    secured.files |= upstream.files
    server = begin(f"https://{CACHE}", f"ca_file = '{tmp_path}/ca.pem'", f"proxy = '{proxy.url}'")
    urls = [nar_url(server, path) for path in paths[:1]]
    secured.behaviours["."] = redirect(f"http://{CACHE}{{path}}")
    for url in [*urls, *(path.narinfo for path in paths[1:TIMES])]:
        assert server.get(url).status == 404
    assert_noted(server, Reason.REDIRECT_TO_HTTP, TIMES, f"from https to 'http://{CACHE}:80'")
    assert not upstream.headers


# Documentation and log interval


def test_how_to_documents_every_reason() -> None:
    page = (
        (DOCS / "how-to/upstream.md")
        .read_text()
        .partition("\n## Responses that are refused\n")[2]
        .partition("\n## ")[0]
    )
    assert re.findall("(?m)^\\| `([a-z_]+)` \\|", page) == list(Reason)


def test_reason_is_logged_again_after_an_hour(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    url = "http://cache.test"
    noted = refusals.Refusals(url, Metrics([], [], 1, [url], list(Reason)).own_upstream(url))
    for now, logged in ((0, 1), (3599, 1), (3600, 2), (3601, 2)):
        monkeypatch.setattr(refusals, "monotonic", lambda now=now: 1e6 + now)
        noted.note(f"{url}/x.narinfo", Reason.TOO_LONG, "longer than 9 bytes")
        assert len(caplog.messages) == logged
    assert caplog.messages[0].startswith("upstream http://cache.test: refused 'x.narinfo': longer than 9 bytes; check ")

"""Requests to upstreams go through the proxy of the settings or the environment, like those of Nix."""

import hashlib
import lzma
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harmonia.nix.narinfo import NarFile
from harmonia.nix.signing import SecretKey
from harmonia.tools.store_builder import StoreBuilder
from support.programs import needs
from support.proxy_server import ProxyServer
from support.running import Server, run
from support.upstream_server import UpstreamServer, file_url, status

Start = Callable[..., Server]

KEY = SecretKey.generate("upstream-1")
CACHE = "cache.test"  # a reserved name that DNS does not have (RFC 6761)
FILE = lzma.compress(
    b"".join(
        len(word).to_bytes(8, "little") + word + bytes(-len(word) % 8)
        for word in (b"nix-archive-1", b"(", b"type", b"regular", b"contents", b"far\n", b")")
    )
)
NAR = NarFile(file_url(hashlib.sha256(FILE).digest(), ".xz"), "xz", hashlib.sha256(FILE).digest(), len(FILE))


@pytest.fixture
def upstream() -> Iterator[UpstreamServer]:
    with UpstreamServer() as upstream:
        yield upstream


@pytest.fixture
def proxy(upstream: UpstreamServer) -> Iterator[ProxyServer]:
    with ProxyServer() as proxy:
        proxy.places[CACHE] = ("127.0.0.1", upstream.server_port)
        yield proxy


@pytest.fixture
def narinfo(upstream: UpstreamServer, tmp_path: Path) -> str:
    """Add a path to the upstream, and return the URL of its narinfo."""
    far = StoreBuilder(tmp_path / "far")
    info = far.add_text("far", b"far\n")
    upstream.add(info, FILE, NAR, keys=(KEY,))
    return f"/{info.path.hash_part}.narinfo"


@pytest.fixture
def begin(start: Start, tmp_path: Path) -> Start:
    StoreBuilder(tmp_path / "store").add_text("here", b"here\n")

    def begin(url: str = f"http://{CACHE}", more: str = "", **environment: str) -> Server:
        upstreams = f"[[upstream]]\nurl = '{url}'\npublic_keys = ['{KEY.public_key}']\n{more}"
        return start(
            store=tmp_path / "store", settings=f"upstream_timeout = 20.0\n{upstreams}", environment=environment
        )

    return begin


def nar_of(server: Server, narinfo: str) -> bytes:
    answer = server.get(narinfo)
    assert answer.status == 200, server.log
    url = re.search("^URL: (.*)$", answer.text, re.MULTILINE)
    assert url
    return server.get(f"/{url[1]}").body


@pytest.mark.parametrize("variable", ["http_proxy", "all_proxy", "ALL_PROXY"])
def test_proxy_variables_for_http_are_used(
    begin: Start, proxy: ProxyServer, narinfo: str, upstream: UpstreamServer, variable: str
) -> None:
    server = begin(**{variable: proxy.url})
    assert nar_of(server, narinfo) == FILE
    assert f"GET http://{CACHE}{narinfo}" in proxy.asked
    assert f"GET http://{CACHE}/{NAR.url}" in proxy.asked
    assert all(headers["Host"] == CACHE for headers in upstream.headers)


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "https_proxy"])
def test_variables_that_curl_ignores_for_http_are_ignored(
    begin: Start, proxy: ProxyServer, narinfo: str, upstream: UpstreamServer, variable: str
) -> None:
    assert nar_of(begin(upstream.url, **{variable: proxy.url}), narinfo) == FILE
    assert not proxy.asked


@pytest.mark.parametrize("no_proxy", ["127.0.0.1", "other,127.0.0.0/8", "*"])
def test_no_proxy_excludes_an_upstream(
    begin: Start, proxy: ProxyServer, narinfo: str, upstream: UpstreamServer, no_proxy: str
) -> None:
    assert nar_of(begin(upstream.url, http_proxy=proxy.url, no_proxy=no_proxy), narinfo) == FILE
    assert not proxy.asked


def test_proxy_setting_takes_precedence_over_the_environment(
    begin: Start, proxy: ProxyServer, narinfo: str, upstream: UpstreamServer
) -> None:
    server = begin(more=f"proxy = '{proxy.url}'", http_proxy="http://127.0.0.1:1", no_proxy="*")
    assert nar_of(server, narinfo) == FILE
    asked = len(proxy.asked)
    assert asked
    assert nar_of(begin(upstream.url, more='proxy = ""', http_proxy=proxy.url), narinfo) == FILE
    assert len(proxy.asked) == asked


def test_proxy_password_is_sent_only_to_the_proxy(
    begin: Start, proxy: ProxyServer, narinfo: str, upstream: UpstreamServer
) -> None:
    proxy.user_and_password = "me@work:ses:ame"
    server = begin(http_proxy=f"http://me%40work:ses%3aame@{proxy.host}/")
    assert nar_of(server, narinfo) == FILE
    assert "Authorization" not in str(upstream.headers)
    assert "ses" not in "".join(server.log)


def test_proxy_error_is_logged_without_the_password(begin: Start, proxy: ProxyServer, narinfo: str) -> None:
    proxy.user_and_password = "me:sesame"
    server = begin(more=f"proxy = 'http://me:wrong-password@{proxy.host}'")
    server.wait_for_log(f"upstream http://{CACHE} cannot be used: status 407 from the proxy")
    assert server.get(narinfo).status == 404
    checked = run("--config", str(server.config), "check-config")
    assert f'proxy = "http://(not shown)@{proxy.host}"' in checked.stdout
    assert "wrong-password" not in checked.stdout + checked.stderr + "".join(server.log)


def test_dead_proxy_marks_the_upstream_as_down(begin: Start, narinfo: str, new_port: Callable[[], int]) -> None:
    server = begin(http_proxy=f"http://127.0.0.1:{new_port()}")
    server.wait_for_log("cannot be used: cannot connect to the proxy")
    assert server.get(narinfo).status == 404
    assert f"upstream http://{CACHE}: down" in server.get("/health?verbose").text


@needs("openssl")
def test_https_is_tunneled_through_the_proxy(
    begin: Start, start: Start, proxy: ProxyServer, narinfo: str, upstream: UpstreamServer, tmp_path: Path
) -> None:
    """The upstream is a Harmonia with TLS, which fetches the path from its own upstream."""
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=cache -keyout key.pem"
        f" -out cert.pem -addext subjectAltName=DNS:{CACHE}"
    )
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    tls = f"tls_cert_path = '{tmp_path}/cert.pem'\ntls_key_path = '{tmp_path}/key.pem'"
    secured = start(
        store=tmp_path / "store", settings=f"{tls}\nupstream_timeout = 20.0\n[[upstream]]\nurl = '{upstream.url}'"
    )
    proxy.user_and_password = "me:sesame"
    proxy.places[f"{CACHE}:443"] = ("127.0.0.1", int(secured.url.rpartition(":")[2]))
    environment = {"HTTPS_PROXY": f"me:sesame@{proxy.host}"}  # variable a scheme, which curl accepts
    server = begin(f"https://{CACHE}", f"ca_file = '{tmp_path}/cert.pem'", **environment)
    assert nar_of(server, narinfo) == FILE
    assert set(proxy.asked) == {f"CONNECT {CACHE}:443"}
    wrong = begin(f"https://{CACHE}", f"proxy = 'http://me:wrong@{proxy.host}'")
    wrong.wait_for_log("cannot be used: status 407 from the proxy")


PRIVATE_HOSTS = ["127.0.0.1:80", "10.0.0.1", "[::1]:8080", "[::ffff:10.0.0.1]", "2130706433", "0x7f.1"]
PRIVATE_HOSTS += ["localhost", "intranet", "db.internal"]


def test_redirect_from_a_public_upstream_to_a_private_address_is_refused(
    begin: Start, proxy: ProxyServer, upstream: UpstreamServer, tmp_path: Path
) -> None:
    server = begin(http_proxy=proxy.url)
    far = StoreBuilder(tmp_path / "far")
    for host in PRIVATE_HOSTS:
        proxy.places[host] = ("127.0.0.1", upstream.server_port)
        info = far.add_text("far", host.encode())
        upstream.add(info, FILE, NAR, keys=(KEY,))
        upstream.behaviours["^/nar/"] = status(302, Location=f"http://{host}/{NAR.url}")
        assert nar_of(server, f"/{info.path.hash_part}.narinfo") == b"Not Found\n"
    assert not [asked for asked in proxy.asked if CACHE not in asked]
    assert f"GET http://{CACHE}/{NAR.url}" in proxy.asked
    server.wait_for_log("public upstream leads to a private address")


def test_redirect_from_a_public_upstream_to_another_public_host_is_followed(
    begin: Start, proxy: ProxyServer, narinfo: str, upstream: UpstreamServer
) -> None:
    with UpstreamServer() as bucket:
        bucket.files[f"/{NAR.url}"] = FILE
        proxy.places["bucket.test"] = ("127.0.0.1", bucket.server_port)
        upstream.behaviours["^/nar/"] = status(302, Location=f"http://bucket.test/{NAR.url}")
        assert nar_of(begin(http_proxy=proxy.url), narinfo) == FILE
    assert f"GET http://bucket.test/{NAR.url}" in proxy.asked


def test_redirect_from_a_private_upstream_to_another_private_host_is_followed(
    begin: Start, proxy: ProxyServer, narinfo: str, upstream: UpstreamServer
) -> None:
    proxy.places["cache.internal"] = proxy.places["10.0.0.1"] = ("127.0.0.1", upstream.server_port)
    upstream.behaviours["^/nar/"] = lambda handler: (
        handler.serve()
        if handler.headers["Host"] == "10.0.0.1"
        else status(302, Location=f"http://10.0.0.1/{NAR.url}")(handler)
    )
    assert nar_of(begin("http://cache.internal", http_proxy=proxy.url), narinfo) == FILE


@pytest.mark.parametrize(
    ("more", "environment", "message"),
    [
        ("proxy = 'socks5://me:sesame@x:1080'", {}, "[[upstream]] 1: proxy: SOCKS proxies are not supported"),
        ("proxy = 'http://me:sesame@x:99999'", {}, "[[upstream]] 1: proxy: not the URL of a proxy"),
        ("proxy = 'https://me:sesame@x'", {}, "[[upstream]] 1: proxy: only connections to a proxy over plain HTTP"),
        ("proxy = 1", {}, "[[upstream]] 1: proxy: expected a string, found integer (not shown)"),
        ("", {"all_proxy": "socks5h://me:sesame@x"}, "proxy: environment variable all_proxy: SOCKS proxies are not"),
    ],
)
def test_unsupported_proxy_prevents_the_start(
    tmp_path: Path, more: str, environment: dict[str, str], message: str
) -> None:
    StoreBuilder(tmp_path)
    config = tmp_path / "harmonia.toml"
    config.write_text(
        f"real_nix_store = '{tmp_path}/nix/store'\nbind = '127.0.0.1:0'\n[[upstream]]\nurl = 'http://{CACHE}'\n{more}\n"
    )
    result = run("--config", str(config), "serve", environment=environment)
    assert result.returncode != 0
    assert message in result.stderr
    assert "sesame" not in result.stderr


def test_doctor_and_top_use_the_proxy(
    start: Start, proxy: ProxyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    StoreBuilder(tmp_path / "store").add_text("here", b"here\n")
    server = start(store=tmp_path / "store")
    proxy.places[CACHE] = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    monkeypatch.setenv("http_proxy", proxy.url)
    assert "a binary cache for /nix/store" in run("doctor", f"http://{CACHE}").stdout
    assert run("top", "--once", "--interval", "0.1", f"http://{CACHE}").returncode == 0
    assert f"GET http://{CACHE}/nix-cache-info" in proxy.asked
    assert f"GET http://{CACHE}/metrics" in proxy.asked
    asked = len(proxy.asked)
    run("--config", str(server.config), "doctor", server.url, environment={"no_proxy": "127.0.0.1"})
    assert len(proxy.asked) == asked

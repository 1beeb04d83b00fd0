"""The nginx and Caddy configurations in docs/how-to/reverse-proxy.md change nothing about the cache."""

import os
import re
import socket
import ssl
import subprocess
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from harmonia.nix.signing import SecretKey
from harmonia.tools.store_builder import StoreBuilder
from support.certificates import openssl
from support.pages import BLOCKS
from support.programs import needs, require
from support.running import PATIENCE_S, Server, nar_url, run, unpacked, wait_until

Start = Callable[..., Server]

SOCKET = "unix:/run/harmonia/socket"


def snippet(language: str) -> str:
    """Return the first block of code in this language on the page."""
    return next(
        block.text for block in BLOCKS if (block.page, block.language) == ("docs/how-to/reverse-proxy.md", language)
    )


@contextmanager
def running(port: int, command: list[str], environment: Mapping[str, str] | None = None) -> Iterator[None]:
    def listens() -> bool:
        assert process.poll() is None, f"{command[0]} ended"
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    with subprocess.Popen(command, env={**os.environ, **(environment or {})}, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(listens)
            yield
        finally:
            process.terminate()


@contextmanager
def nginx(directory: Path, port: int) -> Iterator[str]:
    site = (
        snippet("nginx").replace(SOCKET, f"unix:{directory}/socket").replace("listen 443", f"listen 127.0.0.1:{port}")
    )
    site = site.replace("/etc/ssl/cache/fullchain.pem", f"{directory}/cert.pem")
    site = site.replace("/etc/ssl/cache/key.pem", f"{directory}/key.pem")
    paths = "".join(
        f"{kind}_temp_path {directory}/temp;" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""
    (directory / "nginx.conf").write_text(
        f"{user} daemon off; pid {directory}/pid; error_log {directory}/log; events {{}}\n"
        f"http {{ access_log off; {paths}\n{site}}}\n"
    )
    command = ["nginx", "-e", f"{directory}/log", "-c", f"{directory}/nginx.conf"]
    subprocess.run([*command, "-t"], check=True, capture_output=True)
    with running(port, command):
        yield f"https://localhost:{port}"


@contextmanager
def caddy(directory: Path, port: int) -> Iterator[str]:
    site = snippet("caddyfile").replace("unix//run/harmonia/socket", f"unix/{directory}/socket")
    certificate = f"tls {directory}/cert.pem {directory}/key.pem"
    site = site.replace("cache.example.org {", f"https://localhost:{port} {{\n\t{certificate}")
    (directory / "Caddyfile").write_text(f"{{\n\tadmin off\n\tauto_https disable_redirects\n}}\n{site}")
    home = {"HOME": str(directory), "XDG_DATA_HOME": str(directory), "XDG_CONFIG_HOME": str(directory)}
    with running(port, ["caddy", "run", "--adapter", "caddyfile", "--config", f"{directory}/Caddyfile"], home):
        yield f"https://localhost:{port}"


@pytest.fixture
def certificate(tmp_path: Path) -> ssl.SSLContext:
    made = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 90 -subj /CN=localhost"
    openssl(tmp_path, f"{made} -addext subjectAltName=DNS:localhost -keyout key.pem -out cert.pem")
    return ssl.create_default_context(cafile=tmp_path / "cert.pem")


@needs("openssl")
@pytest.mark.parametrize("proxy", [nginx, caddy], ids=["nginx", "caddy"])
def test_cache_behind_a_proxy(
    proxy: Callable[[Path, int], AbstractContextManager[str]],
    tmp_path: Path,
    start: Start,
    certificate: ssl.SSLContext,
    new_port: Callable[[], int],
) -> None:
    name = proxy.__name__
    require(name)
    store = StoreBuilder(tmp_path / "store")
    info = store.add(store.output_path("large"), {"data": os.urandom(3 << 20)})
    key = SecretKey.generate("cache-1")
    (tmp_path / "key").write_text(key.export())
    (tmp_path / "key").chmod(0o600)
    settings = re.sub(r"(?m)^bind = .*$", "", snippet("toml"))
    server = start(
        store=tmp_path / "store",
        bind=f"unix:{tmp_path}/socket",
        settings=f"sign_key_paths = ['{tmp_path}/key']\naccess_log = true\n{settings}",
    )
    with proxy(tmp_path, new_port()) as url:

        def get(path: str, **headers: str) -> tuple[int, Mapping[str, str], bytes]:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            request = urllib.request.Request(url + path, headers=named)
            with urllib.request.urlopen(request, context=certificate, timeout=PATIENCE_S) as answer:
                return answer.status, answer.headers, answer.read()

        _, headers, whole = get(nar_url(info))
        assert len(whole) == info.nar_size == int(headers["Content-Length"])
        status, headers, part = get(nar_url(info), Range="bytes=1000000-")
        assert (status, part) == (206, whole[1000000:])
        _, headers, encoded = get(nar_url(info), Accept_Encoding="zstd")
        assert headers["Content-Encoding"] == "zstd"
        assert unpacked(encoded) == whole
        _, headers, page = get("/")
        assert url.encode() in page  # including its port
        environment = {"NIX_SSL_CERT_FILE": f"{tmp_path}/cert.pem"}
        answer = run(
            "doctor", url, f"/nix/store/{info.path}", "--public-key", str(key.public_key), environment=environment
        )
    assert (answer.returncode, "0 warnings" in answer.stdout) == (0, True), answer.stdout
    assert any(re.search(r"127\.0\.0\.1 .*GET /nar/", line) for line in server.log), server.log

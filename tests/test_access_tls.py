"""Mutual TLS: clients without a certificate of the given authority get no response."""

import hashlib
import signal
import socket
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from harmonia.nix import base32
from support.certificates import authority, issue
from support.programs import needs
from support.running import Sample, Server, nar_url, read_answer, run

Start = Callable[..., Server]

pytestmark = needs("openssl")

REQUEST = b"GET /version HTTP/1.1\r\nHost: cache\r\n\r\n"


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return Sample.make(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("keys")
    for name in ("server", "ours", "theirs"):
        authority(directory, name)
    (directory / "server.key").chmod(0o600)
    issue(directory, "ours", "client")
    issue(directory, "ours", "reader")
    issue(directory, "theirs", "stranger")
    issue(directory, "ours", "late", days=0)
    return directory


def settings(keys: Path) -> str:
    return (
        f"tls_cert_path = '{keys}/server.pem'\ntls_key_path = '{keys}/server.key'\n"
        f"tls_client_ca_path = '{keys}/ours.pem'"
    )


@pytest.fixture
def server(start: Start, sample: Sample, keys: Path) -> Server:
    return start(store=sample.root, settings=settings(keys), client_certificate=keys / "client.both")


def test_listed_certificate_may_push_without_a_token(start: Start, sample: Sample, keys: Path) -> None:
    push = "\n[push]\nenable = true\nclient_certificates = ['client']\n"
    server = start(store=sample.root, settings=settings(keys) + push, client_certificate=keys / "client.both")
    for name, status in (("client", 200), ("reader", 401)):
        server.client_certificate = keys / f"{name}.both"
        assert server.get("/push/nix-cache-info").status == status
        assert server.get("/nix-cache-info").status == 200


def test_another_certificate_gets_no_remembered_response_of_a_listed_one(
    start: Start, sample: Sample, keys: Path
) -> None:
    push = "\n[push]\nenable = true\nclient_certificates = ['client']\n"
    server = start(store=sample.root, settings=settings(keys) + push, client_certificate=keys / "client.both")
    body = b"content"
    name = base32.encode(hashlib.sha256(body).digest())
    asked = [
        (b"GET", f"/push/{sample.big.path.hash_part}.narinfo", b"", 200),
        (b"GET", f"/push/{'0' * 32}.narinfo", b"", 404),
        (b"PUT", f"/push/nar/{name}.nar", body, 200),
    ]

    def statuses(certificate: str) -> list[int]:
        """Send each request twice on one connection, and all of them three times."""
        server.client_certificate = keys / f"{certificate}.both"
        found = []
        for method, path, content, _ in asked * 3:
            with server.connect() as connection:
                for _ in range(2):
                    length = f"Content-Length: {len(content)}\r\n" if content else ""
                    head = f"{method.decode()} {path} HTTP/1.1\r\nHost: cache\r\n{length}\r\n"
                    connection.sendall(head.encode() + content)
                    answer = read_answer(connection)
                    found.append(answer.status)
                    if answer.headers["connection"] == "close":
                        break
        return found

    assert statuses("client") == [status for *_, status in asked for _ in range(2)] * 3
    assert set(statuses("reader")) == {401}


def attempt(server: Server, certificate: Path | None) -> bool:
    """Return True if a client with that certificate gets a response. TLS 1.3 reports a refusal after the handshake."""
    server.client_certificate = certificate
    try:
        with server.connect() as connection:
            connection.sendall(REQUEST)
            return bool(connection.recv(1))
    except OSError:
        return False


def test_client_with_a_valid_certificate_is_served(server: Server, sample: Sample) -> None:
    assert server.get("/version").status == 200
    assert len(server.get(nar_url(sample.big)).body) == sample.big.nar_size


@pytest.mark.parametrize("certificate", [None, "stranger.both", "server.both"])
def test_client_without_a_valid_certificate_gets_no_response(
    server: Server, keys: Path, certificate: str | None
) -> None:
    (keys / "server.both").write_text((keys / "server.pem").read_text() + (keys / "server.key").read_text())
    assert not attempt(server, keys / certificate if certificate else None)
    assert attempt(server, keys / "client.both")
    host, _, port = server.url.removeprefix("https://").rpartition(":")
    with socket.create_connection((host, int(port)), 20) as plain:  # without TLS
        plain.sendall(REQUEST)
        assert not plain.recv(4096).startswith(b"HTTP")


def test_expired_certificate_is_refused(server: Server, keys: Path) -> None:
    assert not attempt(server, keys / "late.both")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_session_is_resumed(server: Server, keys: Path, version: ssl.TLSVersion) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version
    context.load_cert_chain(keys / "client.both")
    host, _, port = server.url.removeprefix("https://").rpartition(":")
    session = None
    for resumed in (False, True):
        with (
            socket.create_connection((host, int(port)), 20) as connection,
            context.wrap_socket(connection, session=session) as secured,
        ):
            secured.sendall(REQUEST)
            assert read_answer(secured).status == 200
            assert secured.session_reused == resumed
            session = cast("ssl.SSLSession", secured.session)


def test_sighup_keeps_requiring_certificates(server: Server, keys: Path) -> None:
    server.process.send_signal(signal.SIGHUP)
    server.wait_for_log("INFO TLS certificate reloaded")
    assert not attempt(server, None)
    assert attempt(server, keys / "client.both")


def test_sighup_replaces_the_authority(start: Start, sample: Sample, keys: Path, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes((keys / "ours.pem").read_bytes())
    changed = settings(keys).replace(f"{keys}/ours.pem", f"{tmp_path}/ca.pem")
    server = start(store=sample.root, settings=changed, client_certificate=keys / "client.both")
    (tmp_path / "ca.pem").write_bytes((keys / "theirs.pem").read_bytes())
    server.process.send_signal(signal.SIGHUP)
    server.wait_for_log("INFO TLS certificate reloaded")
    assert attempt(server, keys / "stranger.both")
    assert not attempt(server, keys / "client.both")


@needs("curl")
def test_curl_with_and_without_a_certificate(server: Server, keys: Path) -> None:
    command = ["curl", "--silent", "--insecure", "--max-time", "20", f"{server.url}/version"]
    accepted = subprocess.run(
        [*command, "--cert", keys / "client.crt", "--key", keys / "client.key"], capture_output=True, check=True
    )
    assert accepted.stdout.startswith(b"harmonia ")
    refused = subprocess.run(command, capture_output=True, check=False)
    assert (refused.returncode != 0, refused.stdout) == (True, b"")


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot read '"), ("hello", "no certificates in '"), ("", "no certificates in '")]
)
def test_invalid_ca_file_prevents_the_start(
    sample: Sample, keys: Path, tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "ca.pem").write_text(content)
    lines = settings(keys).replace(f"{keys}/ours.pem", f"{tmp_path}/ca.pem")
    config = tmp_path / "harmonia.toml"
    config.write_text(f"real_nix_store = '{sample.root}/nix/store'\n{lines}")
    checked = run("--config", str(config), "check-config")
    assert checked.returncode == 2
    assert checked.stderr.startswith(f"harmonia: {config}:4: tls_client_ca_path: {message}{tmp_path}/ca.pem'")
    assert checked.stderr.count("\n") == 1

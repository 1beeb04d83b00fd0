"""Commands for a private server send the token from a netrc, and to no other server."""

from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from harmonia.config.tokens import new
from harmonia.errors import RemoteError
from harmonia.tools.http_client import Client
from support.running import Sample, Server, run

Start = Callable[..., Server]

SECRET, TOKEN = new("all", ["read", "metrics"])


@pytest.fixture
def netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(path))
    return path


@pytest.fixture
def private(start: Start, tmp_path: Path) -> Server:
    (tmp_path / "tokens").write_text(str(TOKEN))
    sample = Sample.make(tmp_path / "store")
    return start(store=sample.root, settings=f"tokens_path = '{tmp_path}/tokens'")


def test_doctor_and_top_send_the_token(private: Server, netrc: Path) -> None:
    for command in (["doctor", private.url], ["top", "--once", "--interval", "0.1", private.url]):
        netrc.write_text(f"machine other login x password {SECRET}\n")
        refused = run("--config", str(private.config), *command)
        assert refused.returncode != 0
        assert "401" in refused.stdout + refused.stderr
        assert "/etc/nix/netrc" in refused.stdout + refused.stderr
        netrc.write_text(f"machine 127.0.0.1 login x password {SECRET}\n")
        accepted = run("--config", str(private.config), *command)
        assert "/etc/nix/netrc" not in accepted.stdout + accepted.stderr
        assert SECRET not in accepted.stdout + accepted.stderr
    output = run("--config", str(private.config), "doctor", private.url).stdout
    assert "nix-cache-info" in output
    assert "Cache-Control: private, max-age=" in output
    assert "send `Cache-Control" not in output  # the header is right already


def test_token_of_the_configured_server_is_that_of_its_base_url(start: Start, tmp_path: Path, netrc: Path) -> None:
    (tmp_path / "tokens").write_text(str(TOKEN))
    settings = f"tokens_path = '{tmp_path}/tokens'\nbase_url = 'https://cache.example.org'"
    server = start(store=Sample.make(tmp_path / "store").root, bind=f"unix:{tmp_path}/socket", settings=settings)
    netrc.write_text(f"machine cache.example.org login x password {SECRET}\n")
    assert "a binary cache for /nix/store" in run("--config", str(server.config), "doctor").stdout


def test_broken_netrc_is_reported_and_not_shown(private: Server, netrc: Path) -> None:
    netrc.write_text(f'machine 127.0.0.1 password "{SECRET}\n')
    refused = run("doctor", private.url)
    assert refused.returncode == 1
    cause = "a quoted word has no closing quote; correct it, or name another file in $NETRC"
    assert refused.stderr == f"harmonia: cannot read {netrc}: {cause}\n"


def test_token_is_not_sent_after_a_redirect(netrc: Path) -> None:
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert isinstance(self.server, HTTPServer)
            seen.append((self.server.server_port, self.headers.get("Authorization")))
            if self.server is first:
                self.send_response(302)
                self.send_header("Location", f"http://127.0.0.1:{second.server_port}/")
            else:
                self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    first, second = (HTTPServer(("127.0.0.1", 0), Handler) for _ in range(2))
    netrc.write_text(f"default login x password {SECRET}\n")
    with first, second:
        for server in (first, second):
            Thread(target=server.handle_request, daemon=True).start()
        assert Client(f"http://127.0.0.1:{first.server_port}").get("").status == 200
    (_, first_token), (_, second_token) = seen
    assert first_token is not None
    assert second_token is None


def test_without_a_netrc_no_token_is_sent(netrc: Path) -> None:
    assert not netrc.exists()
    with pytest.raises(RemoteError, match="Connection refused"):
        Client("http://127.0.0.1:1").get("")


def test_absolute_url_is_not_sent_to_the_unix_socket(private: Server, tmp_path: Path) -> None:
    assert Client(f"unix:{tmp_path}/nobody").get(f"{private.url}/version").status == 200

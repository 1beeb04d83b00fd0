"""Promises of the commands that ask a private server: they have its token from a netrc, and tell it nobody else."""

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


def test_a_private_cache_is_looked_at_with_its_token(private: Server, netrc: Path) -> None:
    for command in (["doctor", private.url], ["top", "--once", "--interval", "0.1", private.url]):
        netrc.write_text(f"machine other login x password {SECRET}\n")
        refused = run("--config", str(private.config), *command)
        assert refused.returncode != 0
        assert "401" in refused.stdout + refused.stderr
        assert "/etc/nix/netrc" in refused.stdout + refused.stderr
        netrc.write_text(f"machine 127.0.0.1 login x password {SECRET}\n")
        answered = run("--config", str(private.config), *command)
        assert "/etc/nix/netrc" not in answered.stdout + answered.stderr
        assert SECRET not in answered.stdout + answered.stderr
    told = run("--config", str(private.config), "doctor", private.url).stdout
    assert "nix-cache-info" in told
    assert "Cache-Control: private, max-age=" in told
    assert "send `Cache-Control" not in told  # that is as it should be, and nothing to mend


def test_the_token_of_the_settings_own_server_is_that_of_its_base_url(
    start: Start, tmp_path: Path, netrc: Path
) -> None:
    (tmp_path / "tokens").write_text(str(TOKEN))
    settings = f"tokens_path = '{tmp_path}/tokens'\nbase_url = 'https://cache.example.org'"
    server = start(store=Sample.make(tmp_path / "store").root, bind=f"unix:{tmp_path}/socket", settings=settings)
    netrc.write_text(f"machine cache.example.org login x password {SECRET}\n")
    assert "a binary cache for /nix/store" in run("--config", str(server.config), "doctor").stdout


def test_a_broken_netrc_is_told_and_not_shown(private: Server, netrc: Path) -> None:
    netrc.write_text(f'machine 127.0.0.1 password "{SECRET}\n')
    refused = run("doctor", private.url)
    assert refused.returncode == 1
    why = "a quoted word has no closing quote; correct it, or name another file in $NETRC"
    assert refused.stderr == f"harmonia: cannot read {netrc}: {why}\n"


def test_a_redirect_takes_the_token_nowhere_else(netrc: Path) -> None:
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
    (_, told), (_, kept) = seen
    assert told is not None
    assert kept is None


def test_without_a_netrc_nothing_is_sent(netrc: Path) -> None:
    assert not netrc.exists()
    with pytest.raises(RemoteError, match="Connection refused"):
        Client("http://127.0.0.1:1").get("")


def test_what_is_elsewhere_is_not_asked_for_at_a_unix_socket(private: Server, tmp_path: Path) -> None:
    assert Client(f"unix:{tmp_path}/nobody").get(f"{private.url}/version").status == 200

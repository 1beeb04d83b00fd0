"""Private caches and real Nix clients: everything works with a token, and fails quickly without one."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from harmonia.config.tokens import new
from support.certificates import authority, issue, openssl
from support.closure import Closure
from support.nix_client import NIXES, Client
from support.running import Server

Start = Callable[..., Server]

SECRET, TOKEN = new("fleet", ["read"])


def signed(closure: Closure) -> str:
    return f"sign_key_paths = ['{closure.key.secret_file}']\naccess_log = true\n"


def serve(start: Start, closure: Closure, tmp_path: Path, settings: str = "", **options: object) -> Server:
    tokens = tmp_path / "tokens"
    tokens.write_text(str(TOKEN))
    return start(
        store=closure.server.directory,
        settings=f"{signed(closure)}tokens_path = '{tokens}'\n{settings}",
        **options,
    )


def trust(client: Client, url: str, closure: Closure, password: str | None) -> None:
    client.settings |= {"substituters": url, "trusted-public-keys": closure.key.public}
    if password is not None:
        netrc = client.directory / "etc/netrc"
        netrc.write_text(f"machine 127.0.0.1 login fleet password {password}\n")
        client.settings["netrc-file"] = "/etc/netrc"


def answers(server: Server) -> Counter[tuple[str, str]]:
    """Count the requests of Nix with their statuses. The server is stopped, so that the log is complete."""
    server.stop()
    return Counter(re.findall(r"'(\w+ \S+)' (\d{3}) .*Nix/", "".join(server.log)))


def statuses(server: Server) -> set[str]:
    """Return the statuses of all responses to Nix."""
    return {status for _, status in answers(server)}


def test_closure_is_substituted_with_a_token(start: Start, client: Client, closure: Closure, tmp_path: Path) -> None:
    server = serve(start, closure, tmp_path)
    trust(client, server.url, closure, SECRET)
    client.run("nix-store", "--realise", closure.top)
    paths = closure.server.run("nix-store", "--query", "--requisites", closure.top).lines
    client.run("nix-store", "--verify-path", *paths)
    client.run("nix", "copy", "--from", server.url, closure.paths["file-1.0"])
    client.run("nix", "log", "--store", server.url, closure.top)
    assert statuses(server) <= {"200", "404"}
    assert SECRET not in "".join(server.log)


@pytest.mark.parametrize("password", [None, "wrong"])
def test_refused_client_fails_quickly(
    start: Start, client: Client, closure: Closure, tmp_path: Path, password: str | None
) -> None:
    server = serve(start, closure, tmp_path)
    trust(client, server.url, closure, password)
    copied = client.run("nix", "copy", "--from", server.url, closure.top, check=False)
    # Nix ignores the substituter, and has no other source of the path.
    realised = client.run("nix-store", "--realise", closure.top, check=False)
    assert (copied.returncode, realised.returncode) == (1, 1)
    clear = "Unauthorized" if client.nix.version >= (2, 26) else "does not appear to be a binary cache"
    assert clear in copied.stderr
    assert not client.real_path(closure.top).exists()
    asked = answers(server)
    assert {status for _, status in asked} == {"401"}
    assert max(asked.values()) <= 2  # once by each command, without retries


def test_revoked_token_does_not_delay_nix(start: Start, client: Client, closure: Closure, tmp_path: Path) -> None:
    """Nix caches /nix-cache-info for a week, and continues to request unknown paths."""
    server = serve(start, closure, tmp_path)
    trust(client, server.url, closure, SECRET)
    client.run("nix-store", "--realise", closure.paths["dep-1.0"])
    trust(client, server.url, closure, "old")
    assert client.run("nix-store", "--realise", closure.top, check=False).returncode != 0
    asked = answers(server)
    assert "429" not in {status for _, status in asked}
    assert max(times for (_, status), times in asked.items() if status == "401") == 1  # without retries


def test_second_cache_is_used_if_the_first_refuses(
    start: Start, client: Client, closure: Closure, tmp_path: Path
) -> None:
    refusing = serve(start, closure, tmp_path)
    serving = start(
        store=closure.server.directory, settings=f"sign_key_paths = ['{closure.key.secret_file}']\npriority = 50"
    )
    trust(client, f"{refusing.url} {serving.url}", closure, None)
    client.run("nix-store", "--realise", closure.top)
    assert client.real_path(closure.top).exists()


def test_only_the_published_closure_is_substituted(
    start: Start, client: Client, closure: Closure, tmp_path: Path
) -> None:
    roots = tmp_path / "roots"
    roots.mkdir()
    (roots / "dep").symlink_to(closure.paths["dep-1.0"])
    server = start(
        store=closure.server.directory,
        settings=f"{signed(closure)}[publish]\ngc_roots = ['{roots}']",
    )
    trust(client, server.url, closure, None)
    client.run("nix-store", "--realise", closure.paths["dep-1.0"])
    assert client.run("nix-store", "--realise", closure.top, check=False).returncode != 0
    assert statuses(server) == {"200", "404"}, server.log


@pytest.mark.newer_nix
@pytest.mark.parametrize("nix", NIXES[-1:], ids=lambda nix: nix.name, indirect=True)
def test_client_certificate_is_presented(start: Start, client: Client, closure: Closure, tmp_path: Path) -> None:
    """Nix has options for that from 2.34 on."""
    keys = tmp_path / "keys"
    keys.mkdir()
    authority(keys, "ours")
    openssl(
        keys,
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=cache"
        " -addext subjectAltName=IP:127.0.0.1 -keyout server.key -out server.pem",
    )
    (keys / "server.key").chmod(0o600)
    certificate = issue(keys, "ours", "client")
    server = start(
        store=closure.server.directory,
        settings=f"{signed(closure)}tls_cert_path = '{keys}/server.pem'\ntls_key_path = '{keys}/server.key'\n"
        f"tls_client_ca_path = '{keys}/ours.pem'",
        client_certificate=certificate,
    )
    client.settings |= {"ssl-cert-file": f"{keys}/server.pem", "trusted-public-keys": closure.key.public}
    refused = client.run("nix", "copy", "--from", server.url, closure.paths["dep-1.0"], check=False, timeout=60)
    assert refused.returncode == 1
    url = f"{server.url}?tls-certificate={keys}/client.crt&tls-private-key={keys}/client.key"
    client.run("nix", "copy", "--from", url, closure.paths["dep-1.0"])
    assert client.real_path(closure.paths["dep-1.0"]).exists()

"""Clients accept paths signed by a trusted key, and content-addressed paths without a signature."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from harmonia.nix.signing import SecretKey
from support.closure import Closure, build_one
from support.nix_client import Client, Key
from support.running import Server

Start = Callable[..., Server]
MakeClient = Callable[[str], Client]

UNTRUSTED = "not signed by any of the keys"


def key_setting(*keys: Key) -> str:
    return f"sign_key_paths = {[str(key.secret_file) for key in keys]}"


def fetch(client: Client, server: Server, path: str, *trusted: Key) -> str:
    """Substitute `path`; return the message of Nix about signatures if it refuses, otherwise an empty string."""
    client.settings |= {
        "substituters": server.url,
        "trusted-public-keys": " ".join(key.public for key in trusted),
    }
    result = client.run("nix-store", "--realise", path, check=False)
    if result.returncode == 0:
        client.run("nix-store", "--verify-path", path)
        return ""
    assert client.run("nix-store", "--check-validity", path, check=False).returncode != 0
    return result.stderr


def signers(server: Server, path: str) -> list[str]:
    lines = server.get(f"/{path.removeprefix('/nix/store/')[:32]}.narinfo").text.splitlines()
    return [line.split(":")[1].strip() for line in lines if line.startswith("Sig: ")]


def test_either_of_two_keys_suffices(start: Start, make_client: MakeClient, closure: Closure) -> None:
    one, other, wrong = (make_client(name) for name in ("one", "other", "wrong"))
    first, second = one.generate_key("first-1"), other.generate_key("second-1")
    impostor = wrong.generate_key("first-1")  # has the name of the first key
    server = start(store=closure.server.directory, settings=key_setting(first, second))
    path = closure.paths["file-1.0"]

    assert fetch(one, server, path, first) == ""
    assert fetch(other, server, path, second) == ""
    assert UNTRUSTED in fetch(wrong, server, path, impostor)
    assert fetch(wrong, server, path, impostor, second) == ""
    one.settings["trusted-public-keys"] = f"{first.public} {second.public}"
    one.run("nix", "store", "verify", "--recursive", "--sigs-needed", "2", path)


@pytest.mark.nix
def test_sign_key_paths_variable_is_used(start: Start, closure: Closure, tmp_path: Path) -> None:
    for name in ("first-1", "second-1"):
        (tmp_path / name).write_text(SecretKey.generate(name).export())
    keys = f"{tmp_path}/first-1 {tmp_path}/second-1"
    server = start(store=closure.server.directory, environment={"SIGN_KEY_PATHS": keys})
    assert signers(server, closure.paths["dep-1.0"]) == ["first-1", "second-1"]


def test_without_a_key_only_content_addressed_paths_are_accepted(
    start: Start, client: Client, closure: Closure
) -> None:
    server = start(store=closure.server.directory)
    trusted = client.generate_key("trusted-1")
    assert UNTRUSTED in fetch(client, server, closure.paths["dep-1.0"], trusted)
    names = {"added-1.0", "flat-1.0"}
    if client.nix is closure.server.nix:
        names.add("floating-1.0")  # Nix 2.8 hashes self-references differently
    for name in names:
        assert signers(server, closure.paths[name]) == []
        assert fetch(client, server, closure.paths[name], trusted) == ""


def test_stored_signatures_are_served(start: Start, make_client: MakeClient) -> None:
    store, client = make_client("store"), make_client("client")
    own, stored, trusted = (store.generate_key(f"{name}-1") for name in ("own", "stored", "trusted"))
    path = build_one(store, "signed-1.0", "echo signed > $out")
    for key in (stored, trusted):
        store.run("nix", "store", "sign", "--key-file", key.secret_file, path)
    server = start(store=store.directory, settings=key_setting(own))

    assert signers(server, path) == ["own-1", "stored-1", "trusted-1"]
    assert fetch(client, server, path, trusted) == ""


def test_malformed_stored_signatures_affect_no_client(start: Start, make_client: MakeClient) -> None:
    store, client = make_client("store"), make_client("client")
    key = store.generate_key("good-1")
    path = build_one(store, "signed-1.0", "echo signed > $out")
    store.run("nix", "store", "sign", "--key-file", key.secret_file, path)
    with closing(sqlite3.connect(store.db_path)) as database, database:
        bad = "no-colon short-1:AAAA letters-1:?! : a-1:"
        database.execute("update ValidPaths set sigs = ? || ' ' || sigs where path = ?", (bad, path))
    server = start(store=store.directory)

    assert fetch(client, server, path, key) == ""
    assert signers(server, path) == ["good-1"]
    server.wait_for_log("signed-1.0: skipping a stored signature: .* is malformed")

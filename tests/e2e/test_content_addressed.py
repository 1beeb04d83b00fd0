"""Realisations of content-addressed derivations: clients need not build them again, and check their signatures."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from support.nix_client import NIXES, Client, Key
from support.running import Server

Start = Callable[..., Server]
MakeClient = Callable[[str], Client]

# No path refers to itself, because Nix 2.8 computes another hash of such paths than newer versions.
EXPRESSION = """
let
  build = name: outputs: inputs: script: derivation (inputs // {
    inherit name outputs;
    system = builtins.currentSystem;
    builder = "/bin/sh";
    args = [ "-euc" script ];
    PATH = "/usr/bin:/bin";
    __contentAddressed = true;
    outputHashMode = "recursive";
    outputHashAlgo = "sha256";
  });
  dep = build "dep-1.0" [ "out" ] { } "echo dep > $out";
in
build "top-1.0" [ "out" "bin" ] { inherit dep; } "mkdir $out $bin; echo $dep > $out/dep; echo hi > $bin/hi"
"""
OLDER = NIXES[1]


@pytest.fixture
def expression(tmp_path: Path) -> Path:
    path = tmp_path / "expression.nix"
    path.write_text(EXPRESSION)
    return path


@pytest.fixture
def store(make_client: MakeClient) -> Client:
    """Return the client whose store is served."""
    return make_client("store")


def build(client: Client, expression: Path) -> list[str]:
    return client.run("nix-build", "--no-out-link", expression, "-A", "all").lines


def realisations(client: Client) -> set[tuple[str, str, str]]:
    with closing(sqlite3.connect(client.db_path)) as database:
        query = "select drvPath, outputName, path from Realisations join ValidPaths on ValidPaths.id = outputPath"
        return set(database.execute(query))


def trust(client: Client, server: Server, *keys: Key) -> None:
    client.settings |= {"substituters": server.url, "trusted-public-keys": " ".join(key.public for key in keys)}


def test_outputs_are_substituted_instead_of_built(
    start: Start, make_client: MakeClient, store: Client, expression: Path
) -> None:
    """Content-addressed paths need no signatures: the client trusts no key, and must not build."""
    built = build(store, expression)
    server = start(store=store.directory, settings="access_log = true")
    client = make_client("client")
    trust(client, server)
    client.settings["max-jobs"] = "0"
    assert build(client, expression) == built
    for path in built:
        client.run("nix-store", "--verify-path", path)
    assert realisations(client) <= realisations(store)
    asked = "%21" if client.nix.version >= (2, 32) else "!"
    server.wait_for_log(rf"'GET /realisations/sha256:[0-9a-f]{{64}}{asked}bin\.doi' 200 ")


def test_signature_of_a_realisation_is_accepted(
    start: Start, make_client: MakeClient, store: Client, expression: Path
) -> None:
    """`nix copy` checks the signatures of realisations; substitution does not."""
    build(store, expression)
    check_signatures(start, make_client, store, expression)


@pytest.mark.newer_nix
def test_signature_of_a_realisation_by_an_older_nix_is_accepted(
    start: Start, make_client: MakeClient, expression: Path, tmp_path: Path
) -> None:
    """The older Nix stores the dependencies of a realisation. Nix 2.34 does not, so it signs another text."""
    if OLDER.missing is not None:
        pytest.skip(OLDER.missing)
    store = Client(OLDER, tmp_path / "store")
    build(store, expression)
    with closing(sqlite3.connect(store.db_path)) as database:
        assert database.execute("select count(*) from RealisationsRefs").fetchone() == (1,)
    check_signatures(start, make_client, store, expression)


def check_signatures(start: Start, make_client: MakeClient, store: Client, expression: Path) -> None:
    """Check the signatures with a copy of the cache on disk, because Nix 2.34 writes to its source."""
    own, other = store.generate_key("own-1"), store.generate_key("other-1")
    server = start(store=store.directory, settings=f"sign_key_paths = ['{own.secret_file}']")
    cache = expression.parent / "cache"
    store.run("nix", "copy", "--to", f"file://{cache}", "--file", expression, "")
    for file in (cache / "realisations").iterdir():
        file.write_bytes(server.get(f"/realisations/{file.name}").body)
    for name, key in (("trusting", own), ("wary", other)):
        client = make_client(name)
        trust(client, server, key)
        result = client.run("nix", "copy", "--from", f"file://{cache}", "--file", expression, "", check=False)
        if key is own:
            assert result.returncode == 0, result.stderr
            assert realisations(client)
        else:
            assert "cannot register realisation" in result.stderr
            assert not realisations(client)

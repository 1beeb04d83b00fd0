"""`harmonia why` names the cause why a path is not substituted, as the client and as the server see it."""

import json
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from harmonia.cli import EXIT_FOUND
from harmonia.config.tokens import new
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey
from harmonia.tools.fixture_tree import remove_tree
from harmonia.tools.store_builder import StoreBuilder
from harmonia.tools.why import remembered_until
from support.running import Server, run
from support.upstream_server import UpstreamServer, status

Start = Callable[..., Server]

KEY = SecretKey.generate("site-1")


@pytest.fixture
def store(tmp_path: Path) -> StoreBuilder:
    return StoreBuilder(tmp_path / "store")


def signed(store: StoreBuilder, name: str, *references: PathInfo) -> PathInfo:
    return store.add(store.output_path(name), name.encode(), references=[each.path for each in references], keys=[KEY])


class Asking:
    """A client machine with an empty store, whose nix.conf trusts `keys`."""

    def __init__(self, directory: Path, *keys: SecretKey) -> None:
        directory.mkdir()
        StoreBuilder(directory / "empty")
        self.home = directory
        self.conf = directory / "nix.conf"
        self.conf.write_text(f"trusted-public-keys = {' '.join(str(key.public_key) for key in keys)}\n")
        self.config = directory / "harmonia.toml"
        self.config.write_text(f"real_nix_store = '{directory}/empty/nix/store'\n")

    def why(self, path: str, *arguments: str, status: int = EXIT_FOUND) -> dict[str, Any]:
        options = ("--config", str(self.config), "why", "--json", "--nix-conf", str(self.conf))
        done = run(*options, *arguments, path, environment={"HOME": str(self.home), "XDG_CACHE_HOME": str(self.home)})
        assert done.returncode == status, done.stderr + done.stdout
        value: dict[str, Any] = json.loads(done.stdout)
        return value

    def cause(self, path: str, server: Server) -> str:
        """Return why a path cannot be had from the server: the check, and the reason."""
        [source] = self.why(path, "--cache", server.url)["sources"]
        decisive = next(reason for reason in source["reasons"] if reason["decides"])
        assert decisive["remedy"]
        return f"{decisive['code']}: {decisive['text']}"


def test_available_path_names_its_cache(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    library = signed(store, "library")
    program = signed(store, "program", library)
    server = start(store=tmp_path / "store")
    value = Asking(tmp_path / "client", KEY).why(program.path, "--cache", server.url, status=0)
    but = f"nix.conf does not have {server.url} in substituters, so Nix does not ask it"
    assert value["summary"] == f"{program.path} is available from {server.url}, but {but}."
    assert value["sources"][0]["reasons"][-1]["text"].endswith("all in the cache: 2")


def test_cause_at_a_cache_is_named(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    library = signed(store, "library")
    program = signed(store, "program", library)
    unsigned = store.add(store.output_path("unsigned"), b"")
    gone = signed(store, "gone")
    remove_tree(store.real_path(gone.path))
    server = start(store=tmp_path / "store", settings='[publish]\ndeny = ["library"]')
    client = Asking(tmp_path / "client", KEY)
    assert (
        client.cause("0" * 32, server) == f"narinfo: {'0' * 32}.narinfo returns 404: the cache does not have the path"
    )
    assert client.cause(unsigned.path, server).startswith("signatures: ")
    assert client.cause(program.path, server).startswith(f"closure: of its closure, {library.path} cannot")
    assert client.cause(gone.path, server).startswith("NAR: its NAR nar/")
    stranger = Asking(tmp_path / "stranger")
    other = signed(store, "tool", signed(store, "tool-data"))
    [source] = stranger.why(other.path, "--cache", server.url)["sources"]
    [unknown] = [reason for reason in source["reasons"] if reason["decides"]]  # and not the closure, for the same cause
    assert {"code": "keys", "text": "this client trusts no key"}.items() <= source["reasons"][-2].items()
    assert unknown["text"].endswith("signed by site-1, whose public key is unknown here")
    assert unknown["remedy"].startswith("add the key to extra-trusted-public-keys in nix.conf")


def test_remedy_for_a_closure_is_the_command_that_names_the_cause(
    start: Start, store: StoreBuilder, tmp_path: Path
) -> None:
    library = signed(store, "library")
    program = signed(store, "program", library)
    server = start(store=tmp_path / "store", settings='[publish]\ndeny = ["library"]')
    client = Asking(tmp_path / "client", KEY)
    reason = client.why(program.path, "--cache", server.url)["sources"][0]["reasons"][-1]
    harmonia, why, *arguments = reason["remedy"].split()
    assert (harmonia, why) == ("harmonia", "why")
    cause = client.why(arguments.pop(), *arguments)["summary"]
    assert f"{library.path.hash_part}.narinfo returns 404" in cause


def test_cache_that_no_client_accepts_is_named(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    path = signed(store, "program").path
    client = Asking(tmp_path / "client", KEY)
    elsewhere = start(store=tmp_path / "store", settings="virtual_nix_store = '/other/store'")
    assert "is for the store /other/store, not /nix/store" in client.cause(path, elsewhere)
    elsewhere.stop()
    assert client.cause(path, elsewhere) == "connection: Connection refused"
    summary = client.why(path, "--cache", elsewhere.url)["summary"]
    assert summary == f"{path} is not available: {elsewhere.url}: Connection refused."


def test_caches_are_asked_by_priority(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    path = signed(store, "program").path
    StoreBuilder(tmp_path / "bare")
    late, early = start(store=tmp_path / "store"), start(store=tmp_path / "bare", settings="priority = 10")
    client = Asking(tmp_path / "client", KEY)
    value = client.why(path, "--cache", late.url, "--cache", early.url, status=0)
    assert [source["source"] for source in value["sources"]] == [early.url, late.url]
    assert [source["available"] for source in value["sources"]] == [False, True]
    client.conf.write_text(f"substituters = {late.url}?priority=5 s3://bucket\nextra-substituters = {early.url}\n")
    value = client.why(path, "--substituters")
    assert [source["source"] for source in value["sources"]] == [late.url, early.url, "s3://bucket"]
    assert value["summary"].startswith(
        f"{path} is not available: of 3 sources, none provides it; the first is {late.url}"
    )
    [reason] = value["sources"][-1]["reasons"]
    assert reason["text"].startswith("this command cannot ask it: ")
    assert reason["remedy"] == f"nix path-info --store s3://bucket /nix/store/{path}"


@pytest.mark.parametrize(
    ("conf", "options", "status"),
    [("require-sigs = no", "", 0), ("require-sigs = true", "", 3), ("", "?trusted=1", 0), ("", "?trusted=0", 3)],
)
def test_signatures_count_only_if_nix_demands_them(
    start: Start, store: StoreBuilder, tmp_path: Path, conf: str, options: str, status: int
) -> None:
    library = signed(store, "library")
    path = signed(store, "program", library).path
    client = Asking(tmp_path / "client")
    client.conf.write_text(f"{conf}\nsubstituters = {start(store=tmp_path / 'store').url}{options}\n")
    value = client.why(path, "--substituters", status=status)
    demands_none = f"{path}: signed by site-1, which is not checked here"
    assert (demands_none in [reason["text"] for reason in value["sources"][0]["reasons"]]) is (status == 0)


@pytest.mark.parametrize(
    ("conf", "text"),
    [
        ("substituters = {url}/", None),
        ("substituters = {url}?priority=3", None),
        ("substituters =\ntrusted-substituters = {url}", "nix.conf has {url} only in trusted-substituters"),
        ("substituters = http://other.example.org", "nix.conf does not have {url} in substituters"),
    ],
)
def test_cache_that_nix_does_not_ask_is_named(
    start: Start, store: StoreBuilder, tmp_path: Path, conf: str, text: str | None
) -> None:
    path = signed(store, "program").path
    url = start(store=tmp_path / "store").url
    client = Asking(tmp_path / "client", KEY)
    with client.conf.open("a") as file:
        file.write(conf.format(url=url))
    value = client.why(path, "--cache", url, status=0)
    reasons = [reason for reason in value["sources"][0]["reasons"] if reason["code"] == "not_asked"]
    assert [reason["text"].partition(",")[0] for reason in reasons] == ([text.format(url=url)] if text else [])
    assert (", but nix.conf " in value["summary"]) is bool(text)


def test_cache_that_the_daemon_ignores_is_named(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    path = signed(store, "program").path
    url = start(store=tmp_path / "store").url
    client = Asking(tmp_path / "client", KEY)
    with client.conf.open("a") as conf:
        conf.write("substituters =\ntrusted-users = alice\n")
    environment = {
        "NIX_CONF_DIR": str(client.home), "NIX_CONFIG": f"extra-substituters = {url}", "NIX_REMOTE": "daemon",
    }  # fmt: skip
    for options in (["--substituters"], ["--cache", url]):
        done = run("--config", str(client.config), "why", *options, path, environment=environment)
        assert f"is available from {url}, but the Nix daemon ignores {url}, because this user has set it" in done.stdout


def test_token_comes_from_the_file_of_nix(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    path = signed(store, "program").path
    token, line = new("ci", ["read"])
    (tmp_path / "tokens").write_text(str(line))
    url = start(store=tmp_path / "store", settings=f"tokens_path = '{tmp_path}/tokens'").url
    client = Asking(tmp_path / "client", KEY)
    login = f"machine 127.0.0.1 login x password {token}\n"
    (client.home / ".netrc").write_text(login)  # Nix does not read it
    with client.conf.open("a") as conf:
        conf.write(f"substituters = {url}\nnetrc-file = {client.home}/netrc\n")
    value = client.why(path, "--substituters")
    assert "nix-cache-info returns 401" in value["summary"]
    (client.home / "netrc").write_text(login)
    assert client.why(path, "--substituters", status=0)["summary"] == f"{path} is available from {url}."


def test_upstream_is_asked_with_its_token(start: Start, tmp_path: Path) -> None:
    remote = StoreBuilder(tmp_path / "remote")
    path = signed(remote, "program").path
    token, line = new("ci", ["read"])
    (tmp_path / "tokens").write_text(str(line))
    upstream = start(store=tmp_path / "remote", settings=f"tokens_path = '{tmp_path}/tokens'")
    local = Asking(tmp_path / "server", KEY)
    with local.config.open("a") as file:
        file.write(f"[[upstream]]\nurl = '{upstream.url}'\npriority = 7\n")
    refused = local.why(path)["sources"][-1]["reasons"][-1]
    assert refused["remedy"] == "set credentials_file for this upstream"
    with local.config.open("a") as file:
        file.write(f"credentials_file = '{tmp_path}/token'\n")
    assert "name a readable file" in local.why(path)["sources"][-1]["reasons"][0]["text"]
    (tmp_path / "token").write_text(":wrong")
    assert local.why(path)["sources"][-1]["reasons"][-1]["remedy"] == f"put a valid token for it into {tmp_path}/token"
    (tmp_path / "token").write_text(f":{token}")
    value = local.why(path, status=0)
    assert value["summary"] == f"{path} is available from upstream {upstream.url}."
    assert value["sources"][-1]["priority"] == 7


@pytest.mark.parametrize(
    ("number", "text", "remedy"),
    [
        (401, "returns 401: the cache needs a token", "add a token to /etc/nix/netrc"),
        (403, "or does not let this client read it", "run `harmonia why` on the server"),
    ],
)
def test_narinfo_that_is_refused_is_not_called_missing(tmp_path: Path, number: int, text: str, remedy: str) -> None:
    with UpstreamServer() as server:
        server.behaviours["narinfo"] = status(number)
        [source] = Asking(tmp_path / "client").why("0" * 32, "--cache", server.url)["sources"]
    assert text in source["reasons"][-1]["text"]
    assert source["reasons"][-1]["remedy"].startswith(remedy)


@pytest.mark.parametrize("suffix", ["", "^out", "!out", "^*"])
def test_derivation_stands_for_its_output(store: StoreBuilder, tmp_path: Path, suffix: str) -> None:
    info, output = store.add_derivation("app", "/bin/sh")
    local = Asking(tmp_path / "server", KEY)
    local.config.write_text(f"real_nix_store = '{store.real_dir}'\n")
    value = local.why(f"/nix/store/{info.path}{suffix}")
    assert value["path"] == output
    assert f"/nix/store/{output} was never built here" in value["summary"]


def test_unknown_output_of_a_derivation_is_an_error(store: StoreBuilder, tmp_path: Path) -> None:
    info, _ = store.add_derivation("app", "/bin/sh")
    local = Asking(tmp_path / "server", KEY)
    elsewhere = run("--config", str(local.config), "why", f"/nix/store/{info.path}")
    assert elsewhere.returncode == 2
    assert "is a derivation whose outputs are not known here" in elsewhere.stderr
    local.config.write_text(f"real_nix_store = '{store.real_dir}'\n")
    other = run("--config", str(local.config), "why", f"/nix/store/{info.path}^dev")
    assert other.returncode == 2
    assert "has no output 'dev'; it has out" in other.stderr


def test_memory_of_the_client_is_named_until_it_expires(tmp_path: Path) -> None:
    (tmp_path / "nix").mkdir()
    with closing(sqlite3.connect(tmp_path / "nix/binary-cache-v6.sqlite")) as database, database:
        database.execute("create table BinaryCaches (id integer primary key, url text)")
        database.execute("create table NARs (cache integer, hashPart text, timestamp integer, present integer)")
        database.execute("insert into BinaryCaches values (1, 'http://cache/')")
        now = int(time.time())
        database.executemany(
            "insert into NARs values (1, ?, ?, ?)", [("new", now, 0), ("old", now - 60, 0), ("there", now, 1)]
        )
    environ = {"XDG_CACHE_HOME": str(tmp_path)}

    def until(hash_part: str, url: str = "http://cache") -> float | None:
        found = remembered_until(url, hash_part, 50, environ)
        return None if found is None else found.timestamp()

    assert until("new") == now + 50
    assert until("old") is until("there") is until("none") is until("new", "http://other") is None


def test_server_explains_its_own_store_and_its_upstreams(start: Start, tmp_path: Path) -> None:
    remote = StoreBuilder(tmp_path / "remote")
    path = signed(remote, "program").path
    upstream = start(store=tmp_path / "remote")
    local = Asking(tmp_path / "server", KEY)
    assert local.why(path)["summary"].endswith("is valid in the store of this server.")
    with local.config.open("a") as file:
        file.write(f"[[upstream]]\nurl = '{upstream.url}'\npublic_keys = ['{KEY.public_key}']\n")
    value = local.why(path, status=0)
    assert [source["source"] for source in value["sources"]] == ["this server", f"upstream {upstream.url}"]
    named = f"public_keys = ['{KEY.public_key}']"
    text = local.config.read_text()
    local.config.write_text(text.replace(named, f"public_keys = ['{SecretKey.generate('other-1').public_key}']"))
    assert local.why(path)["sources"][1]["reasons"][-1]["code"] == "closure"
    local.config.write_text(text.replace(named, ""))  # without keys, the server passes on all paths
    assert local.why(path, status=0)["summary"] == f"{path} is available from upstream {upstream.url}."


def test_damaged_files_are_named(store: StoreBuilder, tmp_path: Path) -> None:
    info = signed(store, "program")
    local = Asking(tmp_path / "server", KEY)
    local.config.write_text(f"real_nix_store = '{store.real_dir}'\n")
    local.why(info.path, status=0)
    file = Path(os.fsdecode(store.real_path(info.path)))
    file.chmod(0o600)
    file.write_bytes(b"PROGRAM")
    value = local.why(info.path)
    assert "its files are corrupt: the NAR hash is" in value["summary"]
    assert value["sources"][0]["reasons"][-1]["remedy"] == f"nix-store --repair-path /nix/store/{info.path}"


@pytest.mark.parametrize("form", ["{}.narinfo", "https://cache.example.org/{}.narinfo"])
def test_name_of_a_narinfo_stands_for_its_path(store: StoreBuilder, tmp_path: Path, form: str) -> None:
    path = signed(store, "program").path
    local = Asking(tmp_path / "server", KEY)
    local.config.write_text(f"real_nix_store = '{store.real_dir}'\n")
    assert local.why(form.format(path.hash_part), status=0)["path"] == path


def test_name_of_a_valid_path_is_enough(store: StoreBuilder, tmp_path: Path) -> None:
    path = signed(store, "program-1.0").path
    local = Asking(tmp_path / "server", KEY)
    local.config.write_text(f"real_nix_store = '{store.real_dir}'\n")
    assert local.why("program-1.0", status=0)["path"] == path
    done = run("--config", str(local.config), "why", "program-2.0")
    assert done.returncode == 2
    assert "expected a store path like /nix/store/<hash>-<name>" in done.stderr


def test_name_without_version_is_enough_if_only_one_path_has_it(store: StoreBuilder, tmp_path: Path) -> None:
    path = signed(store, "program-1.0").path
    signed(store, "program-tools-1.0")
    local = Asking(tmp_path / "server", KEY)
    local.config.write_text(f"real_nix_store = '{store.real_dir}'\n")
    assert local.why("program", status=0)["path"] == path
    other = signed(store, "program-2.0").path
    done = run("--config", str(local.config), "why", "program")
    assert done.returncode == 2
    assert "PATH 'program' is the name of several valid paths; give one of /nix/store/" in done.stderr
    assert f"/nix/store/{path} " in done.stderr.replace(";", " ")
    assert f"/nix/store/{other} " in done.stderr.replace(";", " ")


@pytest.mark.parametrize(("setting", "named"), [("substitute = false", True), ("substitute = true", False)])
def test_setting_for_which_nix_asks_no_cache_is_named(
    start: Start, store: StoreBuilder, tmp_path: Path, setting: str, *, named: bool
) -> None:
    path = signed(store, "program-1.0").path
    client = Asking(tmp_path / "client", KEY)
    with client.conf.open("a") as conf:
        conf.write(f"{setting}\n")
    url = start(store=tmp_path / "store").url
    with client.conf.open("a") as conf:
        conf.write(f"substituters = {url}\n")
    value = client.why(f"/nix/store/{path}", "--cache", url, status=0)
    reason = ", but nix.conf sets substitute = false, so Nix asks no cache" if named else ""
    assert value["summary"] == f"{path} is available from {url}{reason}."


@pytest.mark.parametrize(("setting", "named"), [("always-allow-substitutes = true", False), ("", True)])
def test_derivation_that_forbids_substitutes_is_named_unless_nix_conf_ignores_that(
    start: Start, store: StoreBuilder, tmp_path: Path, setting: str, *, named: bool
) -> None:
    client = Asking(tmp_path / "client", KEY)
    with client.conf.open("a") as conf:
        conf.write(f"{setting}\n")
    _, output = StoreBuilder(tmp_path / "client/empty").add_derivation("app", "/bin/sh", (), {"allowSubstitutes": ""})
    store.add(output, b"", keys=[KEY])
    value = client.why(f"/nix/store/{output}", "--cache", start(store=tmp_path / "store").url, status=0)
    assert ("sets allowSubstitutes = false" in value["summary"]) is named
    assert [reason["code"] for reason in value["client"]] == ["built_instead"] * named


def test_text_begins_with_one_sentence(store: StoreBuilder, tmp_path: Path) -> None:
    signed(store, "program")
    local = Asking(tmp_path / "server", KEY)
    done = run("--config", str(local.config), "why", "0" * 32)
    assert done.returncode == EXIT_FOUND
    first, _, rest = done.stdout.partition("\n")
    cause = f"no path with the hash {'0' * 32} is valid in the store of this server"
    assert first == f"{'0' * 32} is not available: this server: {cause}."
    assert rest.startswith("this server, priority 30\n  ✗ no path")
    assert "      → build it" in rest

"""The messages in docs/how-to/troubleshoot.md are those of real Nix and of the server."""

import os
import re
import shutil
import socket
import subprocess
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from harmonia.config.tokens import new
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey
from harmonia.tools.store_builder import StoreBuilder
from support.certificates import authority
from support.nix_client import NIXES, Client, Nix
from support.ports import ReservedPort
from support.preloaded import popen
from support.running import HARMONIA, Server, nar_url

PAGE = (Path(__file__).parents[2] / "docs/how-to/troubleshoot.md").read_text()

Start = Callable[..., Server]


def quoted() -> Mapping[str, list[str]]:
    """Return the quoted lines of each section, by heading."""
    found = {}
    for heading, section in re.findall(r"(?ms)^### ([^\n]*)$(.*?)(?=^##|\Z)", PAGE):
        if lines := [line for block in re.findall(r"(?s)```text\n(.*?)```", section) for line in block.splitlines()]:
            found[heading] = lines
    return found


QUOTED = quoted()


def pattern(line: str) -> str:
    """Return a regular expression for a quoted line: `…` matches anything, and the cache has the URL of the test."""
    return re.escape(line).replace("…", ".*").replace("cache:5000", r"127\.0\.0\.1:\d+")


@dataclass
class World:
    """A served store, and clients with one version of Nix."""

    directory: Path
    start: Start
    store: StoreBuilder
    key: SecretKey
    info: PathInfo
    nix: Nix
    clients: int = 0
    said: list[str] = field(default_factory=list)
    """The output of all clients."""

    @property
    def path(self) -> str:
        return f"/nix/store/{self.info.path}"

    def serve(self, settings: str = "", *, signed: bool = True) -> Server:
        key = f"sign_key_paths = ['{self.directory}/key']\n" if signed else ""
        return self.start(store=self.directory / "store", settings=key + settings)

    def client(self, url: str, **settings: str) -> Client:
        self.clients += 1
        client = Client(self.nix, self.directory / f"{self.nix.name}-{self.clients}")
        client.settings |= {
            "substituters": url, "trusted-public-keys": str(self.key.public_key), "download-attempts": "1",
            **{name.replace("_", "-"): value for name, value in settings.items()},
        }  # fmt: skip
        return client

    def run(self, client: Client, *command: str, **environment: str) -> None:
        """Run a command that fails, and append its output, without colours."""
        done = client.run(*command, check=False, environment=environment)
        assert done.returncode != 0, command
        self.said.append(re.sub(r"\x1b\[[\d;]*m", "", done.stderr))

    def realise(self, client: Client) -> None:
        self.run(client, "nix-store", "--realise", self.path)

    def copy(self, client: Client) -> None:
        self.run(client, "nix", "copy", "--from", client.settings["substituters"], self.path)


@pytest.fixture
def worlds(tmp_path: Path, start: Start) -> Iterator[World]:
    """Yield a world for each available Nix."""
    key = SecretKey.generate("cache-1")
    (tmp_path / "key").write_text(key.export())
    (tmp_path / "key").chmod(0o600)

    def made() -> Iterator[World]:
        for nix in NIXES:
            if nix.missing is None:
                shutil.rmtree(tmp_path / "store", ignore_errors=True)
                store = StoreBuilder(tmp_path / "store")
                info = store.add(store.output_path("hello"), {"data": bytes(range(256)) * 4000})
                yield World(tmp_path, start, store, key, info, nix)

    return made()


def another_url(world: World) -> None:
    client = world.client(world.serve().url + "/nix")
    world.realise(client)


def nobody(world: World) -> None:
    with ReservedPort() as port:
        client = world.client(f"http://127.0.0.1:{port.number}")
        world.realise(client)


def _certificates(world: World) -> None:
    if not (world.directory / "server.pem").exists():
        authority(world.directory, "server")
        authority(world.directory, "other")
        (world.directory / "server.key").chmod(0o600)


def _tls(world: World) -> Server:
    _certificates(world)
    directory = world.directory
    return world.serve(f"tls_cert_path = '{directory}/server.pem'\ntls_key_path = '{directory}/server.key'")


def http_to_https(world: World) -> None:
    world.realise(world.client(_tls(world).url.replace("https:", "http:")))


def https_to_http(world: World) -> None:
    _certificates(world)  # newer versions of Nix read the trusted certificates first
    client = world.client(world.serve().url.replace("http:", "https:"))
    world.run(client, "nix-store", "--realise", world.path, NIX_SSL_CERT_FILE=str(world.directory / "other.pem"))


def untrusted_certificate(world: World) -> None:
    client = world.client(_tls(world).url)
    world.run(client, "nix-store", "--realise", world.path, NIX_SSL_CERT_FILE=str(world.directory / "other.pem"))


def token_wanted(world: World) -> None:
    tokens = world.directory / "tokens"
    tokens.write_text(str(new("somebody", ["read"])[1]))
    world.realise(world.client(world.serve(f"tokens_path = '{tokens}'").url))


def another_store(world: World) -> None:
    world.realise(world.client(world.serve("virtual_nix_store = '/guest/nix/store'").url))


def unsigned(world: World) -> None:
    client = world.client(world.serve(signed=False).url)
    world.realise(client)
    world.copy(client)


def untrusted_user(world: World) -> None:
    server = world.serve()
    client = world.client("", allowed_users="*", trusted_users="root")
    script = f"""
    chmod -R a+rX /nix/var/nix
    exec chroot --userspec=65534:65534 / env -u NIX_CONFIG HOME=/tmp NIX_REMOTE=daemon nix-store \
      --option trusted-public-keys {world.key.public_key} --option substituters {server.url} --realise {world.path}
    """
    with client.daemon():
        world.run(client, "sh", "-c", textwrap.dedent(script))


def missing_before(world: World) -> None:
    server = world.serve()
    client = world.client(server.url)
    world.store.delete(world.info.path)
    client.run("nix", "path-info", "--store", server.url, world.path, check=False)
    world.store.add(world.info.path, {"data": bytes(range(256)) * 4000})
    world.realise(client)
    client.run("nix", "copy", "--refresh", "--from", server.url, world.path)


def gone(world: World) -> None:
    server = world.serve()
    client = world.client(server.url)
    client.run("nix", "path-info", "--store", server.url, world.path)
    world.store.delete(world.info.path)
    world.realise(client)


def _data(world: World) -> Path:
    file = Path(world.store.real_dir) / world.info.path / "data"
    file.chmod(0o644)
    return file


def broken_off(world: World) -> None:
    server = world.serve("enable_compression = false")
    client = world.client(server.url, download_attempts="2")
    server.get(nar_url(world.info))  # from now on, the server knows the lengths, and sends at once
    _data(world).write_bytes(_data(world).read_bytes()[:-100])
    world.realise(client)
    assert server.wait_for_log(r"ERROR .* breaks off after \d+ bytes: .*hello")


def other_content(world: World) -> None:
    client = world.client(world.serve("enable_compression = false").url)
    _data(world).write_bytes(_data(world).read_bytes()[::-1])
    world.realise(client)


def busy(world: World) -> None:
    server = world.serve()
    client = world.client(server.url)
    client.run("nix", "path-info", "--store", server.url, world.path)
    Path(world.store.db_path).rename(world.directory / "away")
    world.realise(world.client(server.url))


SYMPTOMS = {
    "Wrong URL": another_url,
    "Connection refused": nobody,
    "http:// to an HTTPS port": http_to_https,
    "https:// to an HTTP port": https_to_http,
    "Certificate not trusted": untrusted_certificate,
    "A token is missing": token_wanted,
    "Wrong store directory": another_store,
    "No trusted signature": unsigned,
    "User not trusted by the daemon": untrusted_user,
    "A miss is cached": missing_before,
    "The path was garbage-collected": gone,
    "The transfer breaks off": broken_off,
    "Hash mismatch": other_content,
    "The server is overloaded": busy,
}


@pytest.mark.nix
@pytest.mark.newer_nix
@pytest.mark.parametrize("symptom", SYMPTOMS)
def test_quoted_messages_are_printed_by_nix(symptom: str, worlds: Iterator[World]) -> None:
    lines = dict.fromkeys(QUOTED[symptom], False)
    asked = 0
    for world in worlds:
        SYMPTOMS[symptom](world)
        for number, said in enumerate(world.said):
            spoken = [line for line in lines if re.search(pattern(line), said)]
            assert spoken, f"{world.nix.name}, command {number}:\n{said}"
            lines |= dict.fromkeys(spoken, True)
        asked += 1
    if asked == 0:
        pytest.skip(str(NIXES[0].missing))
    if asked == len(NIXES):
        assert all(lines.values()), f"no version of Nix prints {[line for line, spoken in lines.items() if not spoken]}"


COMPLAINTS = {
    "Store not found": "real_nix_store = '/none/nix/store'",
    "Database not found": "nix_db_path = '{open}'",
    "Port in use": "bind = '{taken}'",
    "Unreadable key": "sign_key_paths = ['/none/key']",
    "Compressed NARs are not cached": "cache_dir = '/proc/cache'",
    "Key file readable by others": "sign_key_paths = ['{open}']",
}


@pytest.mark.parametrize("symptom", COMPLAINTS)
def test_quoted_messages_are_printed_by_the_server(symptom: str, tmp_path: Path) -> None:
    store = StoreBuilder(tmp_path / "store")
    (tmp_path / "open").write_text(SecretKey.generate("cache-1").export())
    (tmp_path / "open").chmod(0o644)
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        own = COMPLAINTS[symptom].format(open=tmp_path / "open", taken=f"127.0.0.1:{taken.getsockname()[1]}")
        settings = {
            "bind": f"bind = 'unix:{tmp_path}/socket'",
            "real_nix_store": f"real_nix_store = '{store.real_dir}'",
            "cache_dir": f"cache_dir = '{tmp_path}/cache'",
        }
        settings.pop(own.partition(" ")[0], None)
        (tmp_path / "harmonia.toml").write_text("\n".join([own, *settings.values()]))
        [line] = QUOTED[symptom]
        wanted = pattern(line).replace("127\\.0\\.0\\.1:5000", r"127\.0\.0\.1:\d+")
        command = [*HARMONIA, "--config", "harmonia.toml"]
        with popen(command, env=os.environ, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            said = []
            for each in process.stderr:
                said.append(each)
                if re.search(wanted, each) or (" serving " in each and "cannot keep" not in line):
                    break
            process.terminate()
    assert any(re.search(wanted, each) for each in said), said


def test_every_quoting_section_is_tested() -> None:
    of_old_nix = {"Nix 2.3 cannot read zstd": ["unknown compression method 'zstd'"]}  # test_old_nix.py
    assert set(QUOTED) == {*SYMPTOMS, *COMPLAINTS, *of_old_nix}
    assert of_old_nix.items() <= QUOTED.items()

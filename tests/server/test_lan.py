"""Siblings find each other in the local network, here two network namespaces, and cost nothing when they are gone."""

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from harmonia.tools.store_builder import StoreBuilder
from harmonia.upstream.siblings import find_neighbour
from support import preloaded
from support.networks import entering, network
from support.preloaded import HARMONIA, PATCHED
from support.programs import NOT_ROOT, missing
from support.running import PATIENCE_S, Server, patched, wait_until
from support.upstream_paths import KEY

FINDS = f"[lan]\npublic_keys = ['{KEY.public_key}']"
ANNOUNCES = "[lan]\nannounce = true"
ADDRESSES = ("198.51.100.1", "198.51.100.2")
_FAKE = """
import asyncio, sys
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

async def main(address, port, count):
    server = await asyncio.start_server(lambda reader, writer: asyncio.sleep(3600), address, port)
    kind = "_nix_binary_cache._tcp.local."
    zeroconf = AsyncZeroconf()
    services = [
        AsyncServiceInfo(kind, f"{each}.{kind}", port=each, server="fake.local.", parsed_addresses=[address])
        for each in range(port, port + count)
    ]
    await asyncio.gather(*(zeroconf.async_register_service(service, strict=False) for service in services))
    print("announced", flush=True)
    await server.serve_forever()

asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
"""
"""Announces some servers, of which the first accepts connections and never answers, and the others do not exist."""


@dataclass
class Machine:
    """A network namespace with one interface."""

    name: str
    address: str

    def get(self, url: str) -> tuple[int, str]:
        """Return status and body of a response, as seen from this machine."""
        parts = urlsplit(url)
        connection = HTTPConnection(parts.netloc, timeout=PATIENCE_S)
        with closing(connection):
            with network(self.name):
                connection.connect()
            connection.request("GET", url.removeprefix(f"http://{parts.netloc}"))
            response = connection.getresponse()
            return response.status, response.read().decode("latin-1")


def _forbidden() -> str | None:
    if os.geteuid() != 0:
        return NOT_ROOT
    if reason := missing("ip"):
        return reason
    tried = subprocess.run(["unshare", "--net", "true"], check=False, capture_output=True, timeout=30)
    return None if tried.returncode == 0 else "network namespaces are forbidden here; run make test in a VM as root"


pytestmark = pytest.mark.skipif(bool(_forbidden()), reason=str(_forbidden()))


@pytest.fixture
def lan() -> Iterator[tuple[Machine, Machine]]:
    """Create two machines that are connected by a cable."""
    machines = tuple(Machine(f"harmonia-{os.getpid()}-{number}", address) for number, address in enumerate(ADDRESSES))

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, timeout=30)

    try:
        for machine in machines:
            ip("netns", "add", machine.name)
        ip("link", "add", "lan", "netns", machines[0].name, "type", "veth", "peer", "lan", "netns", machines[1].name)
        for machine in machines:
            ip("-n", machine.name, "address", "add", f"{machine.address}/24", "dev", "lan")
            for device in ("lo", "lan"):
                ip("-n", machine.name, "link", "set", device, "up")
        yield machines[0], machines[1]
    finally:
        for machine in machines:
            subprocess.run(["ip", "netns", "delete", machine.name], check=False, timeout=30)


Run = Callable[[Machine, str], Server]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Return a function that starts a server on a machine, with a store of its own."""
    servers: list[Server] = []

    def start(machine: Machine, settings: str) -> Server:
        store = tmp_path / f"store-{machine.address}"
        StoreBuilder(store).add_text("own", machine.address.encode())
        server = Server(
            tmp_path / f"server-{len(servers)}",
            store,
            f"upstream_timeout = 600.0\n{settings}",
            bind=f"{machine.address}:0",
            program=patched(entering(machine.name)),
        )
        servers.append(server)
        server.launch()
        server.url = server.wait_for_log(r"serving .* at ([^\s\"]+)")[1]
        wait_until(lambda: _answers(machine, server))
        return server

    yield start
    for server in servers:
        server.stop()


def _answers(machine: Machine, server: Server) -> bool:
    try:
        return machine.get(f"{server.url}/version")[0] == 200
    except OSError:
        return False


def narinfo(info_path: str) -> str:
    return f"/{info_path[:32]}.narinfo"


def test_signed_paths_of_a_sibling_are_served(lan: tuple[Machine, Machine], run: Run, tmp_path: Path) -> None:
    there, here = lan
    store = StoreBuilder(tmp_path / f"store-{there.address}")
    signed = store.add(store.output_path("signed"), b"signed", keys=[KEY])
    unsigned = store.add_text("unsigned", b"unsigned")
    sibling = run(there, ANNOUNCES)
    server = run(here, f"{FINDS}\nannounce = true")
    server.wait_for_log(f"upstream {re.escape(sibling.url)} is up")
    wait_until(lambda: here.get(f"{server.url}{narinfo(signed.path)}")[0] == 200)
    text = here.get(f"{server.url}{narinfo(signed.path)}")[1]
    url = re.search("^URL: (.*)$", text, re.MULTILINE)
    assert url
    assert here.get(f"{server.url}/{url[1]}")[0] == 200
    assert here.get(f"{server.url}{narinfo(unsigned.path)}")[0] == 404
    assert server.wait_for_log("no signature by any of public_keys")
    health = here.get(f"{server.url}/health?verbose")[1]
    assert f"sibling {sibling.url}: up\n" in health
    assert health.count("sibling") == 1  # it has not found itself
    assert 'harmonia_upstream_up{upstream="lan"} 1.0' in here.get(f"{server.url}/metrics")[1]
    sibling.stop(signal.SIGKILL)
    for number in range(8):  # with upstream_timeout = 600, none of these may wait for it
        assert here.get(f"{server.url}/{number:032}.narinfo")[0] == 404
    wait_until(lambda: f"sibling {sibling.url}: down\n" in here.get(f"{server.url}/health?verbose")[1])


@contextmanager
def announced(machine: Machine, count: int) -> Iterator[None]:
    command = [*PATCHED, entering(machine.name) + _FAKE, machine.address, "5000", str(count)]
    with preloaded.popen(command, env=os.environ, stdout=subprocess.PIPE, text=True) as fake:
        assert fake.stdout is not None
        assert fake.stdout.readline() == "announced\n"
        yield
        fake.kill()


def test_siblings_are_limited(lan: tuple[Machine, Machine], run: Run) -> None:
    there, here = lan
    server = run(here, FINDS)
    with announced(there, 20):
        server.wait_for_log("there are 16 siblings; no more are asked")
        assert here.get(f"{server.url}{narinfo('0' * 32)}")[0] == 404
        assert sum("lan: found" in line for line in server.log) == 16


def test_lookups_do_not_wait_for_a_sibling_that_never_answers(lan: tuple[Machine, Machine], run: Run) -> None:
    there, here = lan
    server = run(here, FINDS)
    with announced(there, 1):
        server.wait_for_log(f"http://{there.address}:5000")
        assert here.get(f"{server.url}{narinfo('0' * 32)}")[0] == 404
        assert "sibling" not in here.get(f"{server.url}/health?verbose")[1]


def test_without_settings_nothing_is_announced_or_asked(lan: tuple[Machine, Machine], run: Run) -> None:
    _, here = lan
    run(here, "")
    with network(here.name):
        sockets = Path("/proc/thread-self/net/udp").read_text()
    assert ":14E9 " not in sockets  # 5353
    assert len(sockets.splitlines()) == 1


@pytest.mark.parametrize("settings", [FINDS, ANNOUNCES], ids=["finds", "announces"])
def test_missing_zeroconf_is_one_line_with_the_remedy(tmp_path: Path, settings: str) -> None:
    (tmp_path / "without").mkdir()
    (tmp_path / "without/zeroconf.py").write_text("raise ModuleNotFoundError(name='zeroconf')\n")
    store = StoreBuilder(tmp_path / "store")
    store.add_text("own", b"")
    (tmp_path / "harmonia.toml").write_text(
        f"real_nix_store = '{tmp_path}/store/nix/store'\nnix_db_path = '{store.db_path}'\n"
        f"cache_dir = '{tmp_path}/cache'\nbind = '127.0.0.1:0'\n{settings}\n"
    )
    answer = subprocess.run(
        [*HARMONIA, "--config", tmp_path / "harmonia.toml", "check-config"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}/without"},
        check=False,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert answer.returncode == 2
    assert "lan.announce: needs the Python package zeroconf; install harmonia[lan]" in answer.stderr


def test_only_addresses_in_networks_of_this_machine_are_neighbours() -> None:
    assert find_neighbour(["127.0.0.1", "203.0.113.1"]) is None

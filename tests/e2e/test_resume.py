"""Interrupted downloads resume where they stopped, over any network, and transfer only the missing bytes."""

import itertools
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from harmonia.nix.signing import SecretKey
from harmonia.tools.store_builder import StoreBuilder
from support.cutting_proxy import CuttingProxy
from support.held_compression import held_by
from support.nix_client import Client
from support.running import Server, patched, wait_until

Start = Callable[..., Server]

MEBIBYTE = 1 << 20
LIMIT = 16 * MEBIBYTE
CUTS = 4  # a client tries five times
FIRST_CUT = 20_000  # bytes on the wire, less than half of the first frame
CUTS_IN_FIRST_FRAME = 2
LEVELS = itertools.cycle(("zstd.level = 9", "zstd.level = 1", "zstd.long_distance_matching = true"))
# Bytes that a cut connection may lose: the socket buffer of the server, and a chunk.
UNDER_WAY = int(Path("/proc/sys/net/ipv4/tcp_wmem").read_text().split()[2]) + MEBIBYTE


def test_download_with_repeated_cuts_completes(start: Start, client: Client, tmp_path: Path) -> None:
    store = StoreBuilder(tmp_path / "store")
    key = SecretKey.generate("resume-1")
    contents = random.Random(1).randbytes(58 * MEBIBYTE)
    small = {f"{number:04}": contents[number : number + 4000] for number in range(2000)}
    info = store.add(store.output_path("big"), {"big": contents, "small": small}, keys=[key])
    assert CUTS * LIMIT < info.nar_size < (CUTS + 1) * LIMIT - MEBIBYTE
    path = f"{store.store_dir}/{info.path}"

    server = start(store=tmp_path / "store", settings="access_log = true\nenable_compression = false")
    with CuttingProxy(port(server), LIMIT, LIMIT) as network:
        client.settings |= {"substituters": network.url, "trusted-public-keys": str(key.public_key)}
        client.run("nix-store", "--realise", path)
        assert network.cuts == CUTS
    client.run("nix-store", "--verify-path", path)

    server.stop()
    found = [re.search(r"'GET /nar/\S+' (\d+) (\d+) ", line) for line in server.log]
    answers = [(int(line[1]), int(line[2])) for line in found if line]
    assert [status for status, _ in answers] == [200] + [206] * CUTS
    assert info.nar_size <= sum(sent for _, sent in answers) < info.nar_size + CUTS * UNDER_WAY


def add_big(store: StoreBuilder, key: SecretKey) -> str:
    """Add a path whose compressed NAR is longer than two cuts, and has other bytes at each level."""
    words = random.Random(1).randbytes(4 * MEBIBYTE)
    tree = {f"{part}": words + bytes([part]) * MEBIBYTE for part in range(7)}
    info = store.add(store.output_path("big"), tree, keys=[key])
    return f"{store.store_dir}/{info.path}"


def statuses(server: Server) -> list[int]:
    """Return the statuses of NAR responses in the access log."""
    found = [re.search(r"'GET /nar/\S+' (\d+) ", line) for line in server.log]
    return [int(line[1]) for line in found if line]


def port(server: Server) -> int:
    found = urlsplit(server.url).port
    assert found
    return found


def test_download_continues_at_a_server_with_another_level(start: Start, client: Client, tmp_path: Path) -> None:
    """A proxy cuts connections, and alternates between two servers, which restart with other settings."""
    key = SecretKey.generate("resume-1")
    path = add_big(StoreBuilder(tmp_path / "store"), key)
    servers = [start(store=tmp_path / "store", settings=f"access_log = true\nzstd.level = {level}") for level in (3, 9)]

    def go_on_elsewhere() -> None:
        """Restart the current server with another encoding, and switch to the other server."""
        cut = servers.pop(0)
        cut.stop(signal.SIGKILL)
        servers.append(
            start(store=tmp_path / "store", cache_dir=cut.cache_dir, settings=f"access_log = true\n{next(LEVELS)}")
        )
        network.port = port(servers[0])

    with CuttingProxy(port(servers[0]), 8 * MEBIBYTE, 10 * MEBIBYTE, go_on_elsewhere) as network:
        client.settings |= {"substituters": network.url, "trusted-public-keys": str(key.public_key)}
        client.run("nix-store", "--realise", path)
        assert network.cuts >= 2
    client.run("nix-store", "--verify-path", path)
    servers[0].stop()
    assert any(re.search(r"'GET /nar/\S+' 206 ", line) for line in servers[0].log), servers[0].log


def test_download_continues_while_the_rest_is_compressed(start: Start, client: Client, tmp_path: Path) -> None:
    """Only the first frame is compressed until the second cut."""
    key = SecretKey.generate("resume-1")
    path = add_big(StoreBuilder(tmp_path / "store"), key)
    held = tmp_path / "held"
    program = held_by(held, least=MEBIBYTE)
    server = start(store=tmp_path / "store", program=program, settings="access_log = true")

    def let_go() -> None:
        if network.cuts == CUTS_IN_FIRST_FRAME:
            network.least = network.most = 1 << 40
            held.unlink()

    with CuttingProxy(port(server), FIRST_CUT, FIRST_CUT, let_go) as network:
        client.settings |= {"substituters": network.url, "trusted-public-keys": str(key.public_key)}
        client.run("nix-store", "--realise", path)
    client.run("nix-store", "--verify-path", path)
    server.stop()
    assert statuses(server) == [200] + [206] * CUTS_IN_FIRST_FRAME


def test_download_continues_after_eviction(start: Start, client: Client, tmp_path: Path) -> None:
    key = SecretKey.generate("resume-1")
    path = add_big(StoreBuilder(tmp_path / "store"), key)
    server = start(store=tmp_path / "store", settings="access_log = true")

    def evict() -> None:
        for file in (server.cache_dir / "nar").iterdir():
            file.unlink(missing_ok=True)  # a growing file may get its final name meanwhile

    with CuttingProxy(port(server), 8 * MEBIBYTE, 10 * MEBIBYTE, evict) as network:
        client.settings |= {"substituters": network.url, "trusted-public-keys": str(key.public_key)}
        narinfo = server.get(f"/{path.rpartition('/')[2][:32]}.narinfo").text
        url = narinfo.partition("URL: ")[2].partition("\n")[0]
        server.get(f"/{url}")
        wait_until(lambda: any((server.cache_dir / "frames").iterdir()))
        client.run("nix-store", "--realise", path)
        assert network.cuts >= 2
    client.run("nix-store", "--verify-path", path)
    server.stop()
    assert statuses(server)[:3] == [200, 200, 206], server.log


def test_url_without_an_encoding_gives_the_whole_nar_or_an_error(start: Start, client: Client, tmp_path: Path) -> None:
    """Clients remember such a URL for 30 days. They never get a mix of two files."""
    key = SecretKey.generate("resume-1")
    path = add_big(StoreBuilder(tmp_path / "store"), key)
    older = patched(
        "from harmonia.server.resources import narinfo\n"
        "narinfo.file_url = lambda info, encoding: narinfo.nar_url(info) + '.zst'"
    )
    server = start(store=tmp_path / "store", program=older)
    with CuttingProxy(port(server), 8 * MEBIBYTE, 10 * MEBIBYTE) as network:
        client.settings |= {"substituters": network.url, "trusted-public-keys": str(key.public_key)}
        client.run("nix-store", "--realise", "--dry-run", path)  # from now on, the client knows the URL
        network.port = port(start(store=tmp_path / "store", settings="zstd.level = 9"))
        broken = client.run("nix-store", "--realise", path, check=False)
        assert broken.returncode != 0
        assert "artial file" in broken.stderr, broken.stderr
        network.least = network.most = 1 << 40
        client.run("nix-store", "--realise", path)
    client.run("nix-store", "--verify-path", path)

"""A download that breaks off goes on where it was: it gets done over any network, and costs what was missing."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from harmonia.nix.signing import SecretKey
from harmonia.tools.store_builder import StoreBuilder
from support.cutting_proxy import CuttingProxy
from support.nix_client import Client
from support.running import Server

Start = Callable[..., Server]

MEBIBYTE = 1 << 20
LIMIT = 16 * MEBIBYTE
CUTS = 4  # a client tries five times
# What is sent in vain when a connection is cut: what the server's socket may hold, and a chunk.
UNDER_WAY = int(Path("/proc/sys/net/ipv4/tcp_wmem").read_text().split()[2]) + MEBIBYTE


def test_a_download_that_is_cut_again_and_again_gets_done(start: Start, client: Client, tmp_path: Path) -> None:
    store = StoreBuilder(tmp_path / "store")
    key = SecretKey.generate("resume-1")
    contents = random.Random(1).randbytes(58 * MEBIBYTE)
    small = {f"{number:04}": contents[number : number + 4000] for number in range(2000)}
    info = store.add(store.output_path("big"), {"big": contents, "small": small}, keys=[key])
    assert CUTS * LIMIT < info.nar_size < (CUTS + 1) * LIMIT - MEBIBYTE
    path = f"{store.store_dir}/{info.path}"

    server = start(store=tmp_path / "store", settings="access_log = true\nenable_compression = false")
    port = urlsplit(server.url).port
    assert port
    with CuttingProxy(port, LIMIT, LIMIT) as network:
        client.settings |= {"substituters": network.url, "trusted-public-keys": str(key.public_key)}
        client.run("nix-store", "--realise", path)
        assert network.cuts == CUTS
    client.run("nix-store", "--verify-path", path)

    server.stop()
    found = [re.search(r"'GET /nar/\S+' (\d+) (\d+) ", line) for line in server.log]
    answers = [(int(line[1]), int(line[2])) for line in found if line]
    assert [status for status, _ in answers] == [200] + [206] * CUTS
    assert info.nar_size <= sum(sent for _, sent in answers) < info.nar_size + CUTS * UNDER_WAY

"""One, two and three servers of a bucket behind nginx: `python -m benchmarks.gates [ROUNDS]`.

The servers have no store, one worker each and the same settings, and nginx sends requests to them in turn, as in
docs/how-to/more-than-one-machine.md. The bucket has 40 paths of 8 MiB, which cannot be compressed, and 400 small ones.
"First" downloads each large NAR once from servers with empty caches, over 6 connections; "again" does so when each
server has all of them. Prints the medians of the rounds. Needs SeaweedFS (`make seaweedfs`), nginx, wrk, root, and
`PYTHONPATH=tests`.
"""

import random
import re
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from benchmarks import servers
from benchmarks.client import Downloads, ask
from harmonia.nix.path_info import PathInfo
from harmonia.tools.store_builder import StoreBuilder
from support.mirrors import KEY, configure, gates, mirror
from support.nginx import nginx
from support.running import Server, wait_until
from support.s3_service import Folder, S3Service

_LARGE, _LARGE_BYTES = 40, 8 << 20
_SMALL, _SMALL_BYTES = 400, 2000
_CONNECTIONS = 6
_ASKING_S = 4
_GIB = 1 << 30

_T = TypeVar("_T")


def _fill(folder: Folder, directory: Path) -> tuple[list[PathInfo], list[PathInfo]]:
    """Write large and small paths to the bucket, and return them."""
    store, content = StoreBuilder(directory / "store"), random.Random(1).randbytes
    large = [store.add(store.output_path(f"large-{number}"), content(_LARGE_BYTES)) for number in range(_LARGE)]
    small = [store.add(store.output_path(f"small-{number}"), content(_SMALL_BYTES)) for number in range(_SMALL)]
    config = configure(store, directory, folder.settings())
    mirror(config, *(info.path for info in (*large, *small)))
    return large, small


def _address(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("http://").partition(":")
    return host, int(port)


class _Measured:
    """Processor time of gates and of nginx during a part of the benchmark."""

    def __init__(self, gates: Sequence[Server], proxy: servers.Server) -> None:
        self._gates = [servers.Server("gate", _address(gate.url), gate.process.pid) for gate in gates]
        self._proxy = proxy

    def run(self, function: Callable[[], _T]) -> tuple[_T, float, float]:
        """Return the result, and the seconds of the gates and of nginx."""
        before = self._seconds()
        result = function()
        gates, proxy = (after - start for after, start in zip(self._seconds(), before, strict=True))
        return result, gates, proxy

    def _seconds(self) -> tuple[float, float]:
        return sum(gate.seconds for gate in self._gates), self._proxy.seconds


def _fetched(gates: Sequence[Server]) -> float:
    """Return the bytes that the gates have fetched from the bucket."""
    found = (
        re.search(r"^harmonia_upstream_fetched_bytes_total\{.*?} (\S+)", gate.get("/metrics").text, re.MULTILINE)
        for gate in gates
    )
    return sum(float(each[1]) for each in found if each)


def _measure(
    folder: Folder, directory: Path, count: int, large: list[PathInfo], small: list[PathInfo]
) -> dict[str, float]:
    found = {}
    with gates(folder, KEY.public_key, directory, count) as running:
        pool = "".join(f"server {gate.url.removeprefix('http://')}; " for gate in running)
        proxied = (
            "proxy_pass http://gates; proxy_http_version 1.1; proxy_set_header Connection ''; proxy_buffering off;"
        )
        upstream = f"upstream gates {{ {pool} keepalive 32; }} keepalive_requests 100000000;"
        with nginx(directory / "nginx", f"location / {{ {proxied} }}", upstream) as (url, _):
            pid_file = directory / "nginx/pid"
            wait_until(lambda: pid_file.read_text().strip())
            proxy = servers.Server("nginx", _address(url), int(pid_file.read_text()))
            measured = _Measured(running, proxy)
            paths = [proxy.nar(info) for info in large]
            downloads = Downloads(_address(url), paths, _CONNECTIONS)
            for name in ("first", "again"):
                (seconds, size), gate_s, proxy_s = measured.run(downloads.run)
                found[f"{name}, MiB/s"] = size / seconds / (1 << 20)
                found[f"{name}, CPU s/GiB of the servers"] = gate_s / size * _GIB
                found[f"{name}, CPU s/GiB of nginx"] = proxy_s / size * _GIB
                if name == "first":
                    found["first, bytes from the bucket for each byte sent"] = _fetched(running) / size
                    for gate in running:
                        Downloads(_address(gate.url), paths, _CONNECTIONS).run()
            asked = [servers.narinfo(info) for info in small]
            for gate in running:
                Downloads(_address(gate.url), asked, _CONNECTIONS).run()
            rate, gate_s, proxy_s = measured.run(lambda: ask(_address(url), asked, 25, _ASKING_S))
            requests = rate.per_second * _ASKING_S / 1000
            found["narinfos/s"] = rate.per_second
            found["CPU ms of the servers for 1,000 narinfos"] = gate_s / requests * 1000
            found["CPU ms of nginx for 1,000 narinfos"] = proxy_s / requests * 1000
    return found


def main(rounds: int) -> None:
    samples: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "s3").mkdir()
        service = S3Service(directory / "s3")
        service.start()
        try:
            folder = service.folder(directory, "private")
            large, small = _fill(folder, directory)
            for number in range(rounds):
                for count in (1, 2, 3):
                    (place := directory / f"{number}-{count}").mkdir()
                    for what, value in _measure(folder, place, count, large, small).items():
                        samples[what][count].append(value)
                print(f"round {number + 1} of {rounds}", file=sys.stderr)
        finally:
            service.close()
    print("| | one | two | three |\n|---|---|---|---|")
    for what, values in samples.items():
        print(f"| {what} | {' | '.join(f'{statistics.median(values[count]):.3g}' for count in (1, 2, 3))} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)

"""How fast a tree of many small files is read, sent and listed, against `nix-store --dump`.

    python benchmarks/many_small_files.py [FILES]

Each is done once to warm the page cache, and then five times, one after the other; told are the medians. "Cold" is the
first request to a new server, "remembered" the second.
"""

import http.client
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from harmonia.nix import base32, nar
from harmonia.store_builder import StoreBuilder

ROUNDS = 5
SIZES = (0, 40, 300, 1000, 2500, 6000)  # as of the files of a Python package, or of a Nix expression


def tree(files: int) -> dict[str, dict[str, bytes]]:
    """Fifty files in each directory."""
    names = [(f"directory-{number // 50:05}", f"file-{number:06}.txt", number) for number in range(files)]
    made: dict[str, dict[str, bytes]] = defaultdict(dict)
    for directory, name, number in names:
        made[directory][name] = b"x" * SIZES[number % len(SIZES)]
    return made


@contextmanager
def server(store: Path) -> Iterator[http.client.HTTPConnection]:
    """A connection to a new server."""
    config = store / "harmonia.toml"
    config.write_text(
        f"bind = '127.0.0.1:0'\nworkers = 1\nreal_nix_store = '{store}/nix/store'\n"
        f"nix_db_path = '{store}/nix/var/nix/db/db.sqlite'\n"
    )
    command = [sys.executable, "-m", "harmonia", "--config", str(config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        address = re.search(r"http://([^/\s]+)", process.stderr.readline())
        assert address
        connection = http.client.HTTPConnection(address[1])
        connection.request("GET", "/version")
        connection.getresponse().read()
        yield connection
        connection.close()
        process.terminate()


def get(connection: http.client.HTTPConnection, url: str) -> int:
    connection.request("GET", url)
    answer = connection.getresponse()
    assert answer.status == 200
    buffer = bytearray(1 << 20)
    size = 0
    while count := answer.readinto(buffer):
        size += count
    return size


def nix_dump(path: bytes) -> int:
    with subprocess.Popen(["nix-store", "--dump", path], stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout
        buffer = bytearray(1 << 20)
        size = 0
        while count := process.stdout.readinto(buffer):  # type: ignore[attr-defined]
            size += count
    return size


def main() -> None:
    files = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    seconds: dict[str, list[float]] = defaultdict(list)

    def timed(what: str, do: Callable[[], int], size: int | None = None) -> None:
        start = time.perf_counter()
        done = do()
        seconds[what].append(time.perf_counter() - start)
        assert done == size or size is None

    with tempfile.TemporaryDirectory() as directory:
        store = StoreBuilder(directory)
        info = store.add(store.output_path("many"), tree(files))
        path, size = store.real_path(info.path), info.nar_size
        url = f"/nar/{info.path.hash_part}-{base32.encode(info.nar_hash)}.nar"
        for _ in range(ROUNDS + 1):
            timed("nix-store --dump", lambda: nix_dump(path), size)
            timed("nar.read(nar.dump())", lambda: sum(map(len, nar.read(nar.dump(path)))), size)
            with server(Path(directory)) as connection:
                timed("GET the NAR, cold", lambda: get(connection, url), size)
                timed("GET the NAR, remembered", lambda: get(connection, url), size)
            with server(Path(directory)) as connection:
                timed("GET the listing, cold", lambda: get(connection, f"/{info.path.hash_part}.ls"))
                timed("GET the listing, remembered", lambda: get(connection, f"/{info.path.hash_part}.ls"))

    nix = statistics.median(seconds["nix-store --dump"][1:])
    print(f"{files} files, a NAR of {size / 1e6:.0f} MB\n")
    print("| what | seconds | times nix-store --dump |\n|---|---|---|")
    for what, all_seconds in seconds.items():
        median = statistics.median(all_seconds[1:])
        print(f"| {what} | {median:.2f} | {median / nix:.2f} |")


if __name__ == "__main__":
    main()

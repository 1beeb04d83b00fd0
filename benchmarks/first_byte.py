"""Time to the first byte of a large NAR, for each kind of request, on a server that has just started.

    python benchmarks/first_byte.py [MIB]

The NAR has that many MiB (default: 4096) of programs and libraries of this machine. "Cold" is the first request to a
server, "warm" the same request after the NAR was compressed. Prints a table, and the load of the machine.
"""

import bz2
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

from harmonia.cache.zstd import Encoding
from harmonia.config.tables.zstd import Zstd
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey
from harmonia.server.resources.narinfo import file_url, nar_url
from harmonia.tools.store_builder import StoreBuilder

MIB = 1 << 20
LOG_MIB = 100
DERIVATION = f"{'0' * 32}-log.drv"


def write_content(target: Path, size: int) -> None:
    files = [Path(top, name) for top, _, names in os.walk("/usr/lib") for name in names]
    with target.open("wb") as out:
        for file in cycle(file for file in files if file.is_file() and not file.is_symlink()):
            with file.open("rb") as content:
                while data := content.read(min(MIB, size - out.tell())):
                    out.write(data)
            if out.tell() >= size:
                return


@contextmanager
def harmonia(root: Path, settings: str = "") -> Iterator[tuple[str, int]]:
    """Start a new server, and yield it and its address."""
    with tempfile.TemporaryDirectory(dir=root) as directory:
        config = Path(directory, "harmonia.toml")
        config.write_text(
            f"bind = '127.0.0.1:0'\nworkers = 1\ncache_dir = '{directory}'\nreal_nix_store = '{root}/nix/store'\n"
            f"nix_db_path = '{root}/nix/var/nix/db/db.sqlite'\nlog_dir = '{root}/log'\n{settings}\n"
        )
        command = [sys.executable, "-m", "harmonia", "--config", str(config)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr
            found = next(
                filter(None, (re.search(r"serving .* at http://([^:]+):(\d+)", line) for line in process.stderr))
            )
            try:
                yield found[1], int(found[2])
            finally:
                process.kill()


def first_byte(address: tuple[str, int], path: str, headers: Mapping[str, str], version: str, take: int = 1) -> float:
    """Return the seconds until the first byte of the body. Reads `take` bytes of it."""
    fields = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    with socket.create_connection(address) as connection:
        began = time.perf_counter()
        connection.sendall(f"GET {path} HTTP/{version}\r\nHost: cache\r\nConnection: close\r\n{fields}\r\n".encode())
        stream = connection.makefile("rb")
        head = b"".join(iter(stream.readline, b"\r\n"))
        assert head.split()[1] in {b"200", b"206"}, head
        assert stream.read(1)
        seconds = time.perf_counter() - began
        stream.read(take - 1)
        return seconds


def row(what: str, *seconds: float | None) -> None:
    cells = ("" if each is None else f"{each:.3f} s" for each in seconds)
    print(f"| {what} | {' | '.join(cells)} |", flush=True)


def measure(root: Path, info: PathInfo) -> None:
    file, nar = f"/{file_url(info, Encoding.of(Zstd()))}", f"/{nar_url(info)}"
    slow = Encoding.of(Zstd(level=19))
    middle = info.nar_size // 40
    ways: list[tuple[str, str, dict[str, str], str]] = [
        ("`.nar.zst`, HTTP/1.1", file, {}, "1.1"),
        ("`.nar.zst`, HTTP/1.0", file, {}, "1.0"),
        ("`.nar.zst`, HTTP/1.1, `bytes=30000-`", file, {"Range": "bytes=30000-"}, "1.1"),
        (f"`.nar.zst`, HTTP/1.1, `bytes={middle}-`", file, {"Range": f"bytes={middle}-"}, "1.1"),
        ("`.nar.zst`, HTTP/1.0, `bytes=0-999`", file, {"Range": "bytes=0-999"}, "1.0"),
        ("`.nar.zst`, HTTP/1.0, `bytes=30000-`", file, {"Range": "bytes=30000-"}, "1.0"),
        ("`.nar`, HTTP/1.1", nar, {}, "1.1"),
        ("`.nar`, HTTP/1.0", nar, {}, "1.0"),
        ("`.nar`, `Accept-Encoding: zstd`", nar, {"Accept-Encoding": "zstd"}, "1.1"),
    ]
    cold = []
    for _, path, headers, version in ways:
        with harmonia(root) as address:
            cold.append(first_byte(address, path, headers, version))
    print("| request | cold | warm |\n|---|---|---|")
    with harmonia(root) as address:
        first_byte(address, file, {"Range": "bytes=-1"}, "1.1")  # waits until the NAR is compressed
        for (what, path, headers, version), seconds in zip(ways, cold, strict=True):
            row(what, seconds, first_byte(address, path, headers, version))
    with harmonia(root) as address:
        first_byte(address, file, {}, "1.1", middle)
        row(
            "`.nar.zst`, resumed where it was cut, a 40th of the NAR's size",
            first_byte(address, file, {"Range": f"bytes={middle}-"}, "1.1"),
        )
    with harmonia(root) as address:
        path = file.replace(Encoding.of(Zstd()).name, slow.name)
        row("`.nar.zst` of level 19 at a server of level 3", first_byte(address, path, {}, "1.1"))
    for what, version in (("HTTP/1.1", "1.1"), ("HTTP/1.0", "1.0")):
        with harmonia(root) as address:
            row(f"`.bz2` log of {LOG_MIB} MiB, {what}", first_byte(address, f"/log/{DERIVATION}", {}, version))

    StoreBuilder(root / "empty").add_text("here", b"here\n")
    for form in ("none", "zstd"):
        for version in ("1.1", "1.0"):
            with harmonia(root, f"nar_compression = '{form}'") as (host, port):
                upstream = f"upstream_timeout = 20.0\n[[upstream]]\nurl = 'http://{host}:{port}'"
                with harmonia(root / "empty", upstream) as address:
                    url = f"http://{address[0]}:{address[1]}/{info.path.hash_part}.narinfo"
                    with urllib.request.urlopen(url) as answer:
                        fields = dict(line.split(": ", 1) for line in answer.read().decode().splitlines())
                    seconds = first_byte(address, f"/{fields['URL']}", {}, version)
            row(f"`/upstream/…`, HTTP/{version}, of a Harmonia with `nar_compression = '{form}'`", seconds)


def main() -> None:
    size = int(sys.argv[1] if len(sys.argv) > 1 else "4096") * MIB
    with tempfile.TemporaryDirectory(dir=Path.home() / ".cache") as name:
        root = Path(name)
        root.chmod(0o755)
        store = StoreBuilder(root)
        write_content(root / "content", size)
        info = store.add(store.output_path("large"), root / "content", keys=[SecretKey.generate("bench-1")])
        drvs = root / "log" / "drvs" / DERIVATION[:2]
        drvs.mkdir(parents=True)
        (drvs / f"{DERIVATION[2:]}.bz2").write_bytes(bz2.compress(os.urandom(MIB // 2).hex().encode() * LOG_MIB, 1))
        measure(root, info)
        print("load:", *os.getloadavg())


if __name__ == "__main__":
    main()

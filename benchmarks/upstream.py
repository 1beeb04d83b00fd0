"""Speed of NARs from an upstream, compared with the upstream itself: nginx with a static cache, on this machine.

    PYTHONPATH=tests python benchmarks/upstream.py [DIRECTORY]

The NAR is that of the directory. "First" is sent while it is fetched, and cached; "second" comes from the cache on
disk; "passed on" cannot be cached. Each is measured on a new server with one worker, five times in sequence; the table
has the medians. "CPU" is the server's CPU time per GB sent, including the check after the first download.
"""

import hashlib
import http.client
import lzma
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import zstandard

from harmonia.nix import base32, narinfo
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey
from harmonia.nix.store_path import StorePath
from harmonia.store import file_reader, tree_reader
from harmonia.tools.store_builder import StoreBuilder
from support.ports import ReservedPort

ROUNDS = 5
KEY = SecretKey.generate("upstream-1")
PACK: dict[str, Callable[[bytes], bytes]] = {
    "none": bytes,
    "zstd": zstandard.ZstdCompressor(3, threads=-1).compress,
    "xz": lambda content: lzma.compress(content, preset=1),
}


def static_cache(root: Path, content: bytes, compression: str) -> tuple[PathInfo, str]:
    """Write a static cache with that NAR to `root`. Return its path info and the URL of the NAR."""
    file = PACK[compression](content)
    digest = hashlib.sha256(file).digest()
    nar_file = narinfo.NarFile(f"nar/{base32.encode(digest)}.nar", compression, digest, len(file))
    info = PathInfo(StorePath(f"{'0' * 32}-there"), hashlib.sha256(content).digest(), len(content))
    sigs = [KEY.sign(info.fingerprint("/nix/store"))]
    (root / "nar").mkdir(parents=True)
    (root / "nix-cache-info").write_text("StoreDir: /nix/store\n")
    (root / f"{info.path.hash_part}.narinfo").write_text(narinfo.render(info, "/nix/store", nar_file, sigs))
    (root / nar_file.url).write_bytes(file)
    return info, nar_file.url


@contextmanager
def nginx(directory: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Start nginx. Yield its process and its address."""
    temporary = "".join(f"{kind}_temp_path {directory};" for kind in ("proxy", "fastcgi", "uwsgi", "scgi"))
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    assert program, "nginx is not installed"
    with ReservedPort() as reserved:
        port = reserved.number
        (directory / "nginx.conf").write_text(
            f"daemon off; master_process off; pid {directory}/pid; error_log {directory}/error.log; events {{}}"
            f"http {{ access_log off; sendfile on; client_body_temp_path {directory}; {temporary}"
            f"server {{ listen 127.0.0.1:{port}; root {root}; }} }}"
        )
        with subprocess.Popen([program, "-e", directory / "error.log", "-c", directory / "nginx.conf"]) as process:
            while not listens(port):
                assert process.poll() is None, (directory / "error.log").read_text()
                time.sleep(0.01)
            try:
                yield process.pid, f"127.0.0.1:{port}"
            finally:
                process.terminate()


def listens(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def harmonia(store: Path, upstream: str, cache: Path) -> Iterator[tuple[int, str]]:
    """Start Harmonia. Yield its main process and its address."""
    config = store / "harmonia.toml"
    config.write_text(
        f"bind = '127.0.0.1:0'\nworkers = 1\nreal_nix_store = '{store}/nix/store'\ncache_dir = '{cache}'\n"
        f"nix_db_path = '{store}/nix/var/nix/db/db.sqlite'\nupstream_timeout = 10.0\n"
        f"[[upstream]]\nurl = 'http://{upstream}'\npublic_keys = ['{KEY.public_key}']\n"
    )
    command = [sys.executable, "-m", "harmonia", "--config", str(config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        address = next(filter(None, (re.search(r"serving .* at http://([^/\s]+)", line) for line in process.stderr)))[1]
        try:
            yield process.pid, address
        finally:
            process.terminate()
            process.stderr.read()


def cpu(process: int) -> float:
    """Return the CPU seconds of a process and its children."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    stats = [Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split() for each in [process, *children]]
    return sum(int(fields[11]) + int(fields[12]) for fields in stats) / os.sysconf("SC_CLK_TCK")


def get(address: str, path: str) -> int:
    connection = http.client.HTTPConnection(address)
    connection.request("GET", path)
    answer = connection.getresponse()
    assert answer.status == 200, answer.status
    buffer = bytearray(1 << 20)
    size = 0
    while count := answer.readinto(buffer):
        size += count
    connection.close()
    return size


def nar_path(address: str, info: PathInfo) -> str:
    connection = http.client.HTTPConnection(address)
    connection.request("GET", f"/{info.path.hash_part}.narinfo")
    text = connection.getresponse().read().decode()
    connection.close()
    found = re.search("^URL: (.*)$", text, re.MULTILINE)
    assert found, text
    return f"/{found[1]}"


def download(process: int, address: str, path: str) -> tuple[float, float]:
    """Download once. Return the bytes per second, and the CPU seconds of the process per byte."""
    began, before = time.perf_counter(), cpu(process)
    size = get(address, path)
    return size / (time.perf_counter() - began), (cpu(process) - before) / size


def wait_until_kept(cache: Path) -> None:
    """Wait until the server has checked the download, which continues after the last byte."""
    while any(file.suffix == ".growing" for file in (cache / "nar").iterdir()):
        time.sleep(0.01)


def measure(directory: Path, content: bytes, compression: str) -> Iterator[tuple[str, float, float]]:
    """Measure each case. Yield its name, bytes per second, and CPU seconds per byte."""
    StoreBuilder(directory / "store").add_text("here", b"here\n")
    (directory / "file").write_text("in the way")
    info, url = static_cache(directory / "static", content, compression)
    size = (directory / "static" / url).stat().st_size
    with nginx(directory, directory / "static") as (web_server, upstream):
        for number in range(ROUNDS + 1):
            yield "nginx", *download(web_server, upstream, f"/{url}")
            with harmonia(directory / "store", upstream, directory / str(number)) as (process, address):
                path, before = nar_path(address, info), cpu(process)
                rate, _ = download(process, address, path)
                wait_until_kept(directory / str(number))
                yield "first", rate, (cpu(process) - before) / size
                yield "second", *download(process, address, path)
            with harmonia(directory / "store", upstream, directory / "file" / "cache") as (process, address):
                yield "passed on", *download(process, address, nar_path(address, info))


def main() -> None:
    tree = sys.argv[1] if len(sys.argv) > 1 else "/usr/lib/python3.11"
    content = b"".join(file_reader.read(tree_reader.dump(os.fsencode(tree))))
    print(f"A NAR of {len(content) / 1e6:.0f} MB\n")
    print("| compression | | MB/s | times nginx | CPU, s/GB |\n|---|---|---|---|---|")
    for compression in PACK:
        measured: dict[str, list[tuple[float, float]]] = defaultdict(list)
        with tempfile.TemporaryDirectory() as name:
            Path(name).chmod(0o755)
            for what, rate, processor in measure(Path(name), content, compression):
                measured[what].append((rate, processor))
        medians = {
            what: [statistics.median(each) for each in zip(*rounds[1:], strict=True)]
            for what, rounds in measured.items()
        }
        for what, (rate, processor) in medians.items():
            times = rate / medians["nginx"][0]
            print(f"| {compression} | {what} | {rate / 1e6:.0f} | {times:.2f} | {processor * 1e9:.2f} |", flush=True)


if __name__ == "__main__":
    main()

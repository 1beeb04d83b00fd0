"""Push of a closure of 500 paths, against other ways into the same Nix daemon: `python -m benchmarks.push`.

The other ways are `nix copy --from` a binary cache of files, and `nix copy --to ssh-ng://` without encryption: `ssh` is
a script that connects to the daemon. `nix copy --to` an nginx that only stores what it receives shows how long the
client itself takes for its requests. Each run starts with an empty store. Prints the seconds of each run, the processor
time of the server's workers, and the peak memory of one. Needs root, Nix, nginx, and `PYTHONPATH=tests`.

Arguments: the number of runs, the number of the Nix in `nix_client.NIXES`, and the number of workers.

On a busy machine, run it with `chrt --rr 1`, and with `TMPDIR=/dev/shm` if the disk is busy.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.nginx import nginx
from support.nix_client import NIXES, Client, Key
from support.preloaded import NOT_PRELOADED
from support.push_target import Target
from support.running import Server, peak_bytes

PATHS = 500
_FILE_BYTES = 100_000

_CLOSURE = f"""
let
  needs = number:
    if number == {PATHS - 1} then builtins.genList (other: other) number
    else if number == 0 then [ ]
    else [ (number / 2) (number / 3) ];
  make = number: derivation {{
    name = "path-${{toString number}}";
    system = builtins.currentSystem;
    builder = "/bin/sh";
    PATH = "/usr/bin:/bin";
    args = [ "-c" ''
      mkdir $out; head -c {_FILE_BYTES} /dev/urandom >$out/data; seq 20000 >$out/text; echo $references >$out/references
      exit
    '' ];
    references = map (builtins.elemAt paths) (needs number);
  }};
  paths = builtins.genList make {PATHS};
in builtins.elemAt paths {PATHS - 1}
"""


@contextmanager
def target(directory: Path, nix: int, key: Key) -> Iterator[Target]:
    """Make a machine with an empty store, whose daemon trusts no user."""
    client = Client(NIXES[nix], directory)
    client.run("nix-store", "--init")
    client.settings |= {"trusted-users": "nobody-at-all", "trusted-public-keys": key.public}
    servers: list[Server] = []

    def start(**options: object) -> Server:
        server = Server(directory.with_name(f"{directory.name}-server"), **options)  # type: ignore[arg-type]
        servers.append(server)
        server.start()
        return server

    try:
        with client.daemon():
            yield Target(client, key, start)
    finally:
        for server in servers:
            server.stop()


_SSH = """\
#!/usr/bin/python3
import os, socket, threading
daemon = socket.socket(socket.AF_UNIX)
daemon.connect("SOCKET")
def send():
    while data := os.read(0, 65536):
        daemon.sendall(data)
    daemon.shutdown(socket.SHUT_WR)
threading.Thread(target=send, daemon=True).start()
while data := daemon.recv(65536):
    while data:
        data = data[os.write(1, data):]
"""


def processor_s(process: int) -> float:
    """Return the seconds of processor time that a process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    runs, nix, workers = (*map(int, sys.argv[1:]), *(3, 0, 1)[len(sys.argv) - 1 :])
    took: dict[str, list[float]] = {}
    memory, worker_s = 0, []
    with tempfile.TemporaryDirectory(prefix="push-", ignore_cleanup_errors=True) as name:
        root = Path(name)
        source = Client(NIXES[nix], root / "source")
        source.settings["netrc-file"] = str(root / "netrc")
        key = source.generate_key("pusher-1")
        (top,) = source.build(_CLOSURE, timeout=1200)
        source.run("nix", "store", "sign", "--recursive", "--key-file", key.secret_file, top, timeout=600)
        count = len(source.run("nix-store", "--query", "--requisites", top).lines)
        source.run("nix", "copy", "--to", f"file://{root}/cache?compression=none", top, timeout=600)
        ssh = root / "ssh"

        def timed(way: str, client: Client, *command: str) -> None:
            began = time.monotonic()
            client.run(*command, timeout=600)
            took.setdefault(way, []).append(time.monotonic() - began)

        for run in range(runs):
            for compression in ("none", "zstd"):
                with target(root / f"{compression}{run}", nix, key) as machine:
                    server = machine.serve(access_log=False, workers=workers, program=NOT_PRELOADED)
                    url = f"{server.url}/push?compression={compression}"
                    before = sum(map(processor_s, server.workers))
                    timed(f"push, {compression}", source, "nix", "copy", "--to", url, top)
                    worker_s.append(sum(map(processor_s, server.workers)) - before)
                    memory = max(memory, *map(peak_bytes, server.workers))
                place = root / f"nginx-{compression}{run}"
                stores = f"client_max_body_size 0; root {place}; dav_methods PUT; create_full_put_path on;"
                with nginx(place, stores) as (url, _):
                    target_url = f"{url}/?compression={compression}"
                    timed(f"to nginx, {compression}", source, "nix", "copy", "--to", target_url, top)
            if (NIXES[nix].root / "usr/bin/python3").exists():  # runs the script
                with target(root / f"ssh{run}", nix, key) as machine:
                    socket = machine.client.directory / "nix/var/nix/daemon-socket/socket"
                    ssh.write_text(_SSH.replace("SOCKET", str(socket)))
                    ssh.chmod(0o755)
                    copy = f"PATH={root}:$PATH exec nix copy --to ssh-ng://target {top}"
                    timed("ssh-ng, no encryption", source, "sh", "-c", copy)
            with target(root / f"file{run}", nix, key) as machine:
                timed("from file://", machine.client, "nix", "copy", "--from", f"file://{root}/cache", top)
    print(f"{count} paths, Nix {'.'.join(map(str, NIXES[nix].version))}, {runs} runs, {workers} workers")
    for way, seconds in took.items():
        print(f"{way:24} {statistics.median(seconds):6.2f} s  {[round(each, 2) for each in seconds]}")
    print(f"processor time of the workers: {statistics.median(worker_s):.2f} s")
    print(f"memory of a worker: {memory >> 20} MiB at most")


if __name__ == "__main__":
    main()

"""Nix clients substitute paths from the server, verified, with no request too many."""

import re
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.closure import Closure, requisites
from support.nginx import nginx
from support.nix_client import NIXES, Client
from support.running import Server, peak_bytes

Start = Callable[..., Server]
MakeClient = Callable[[str], Client]

MEBIBYTE = 1 << 20


def serve(start: Start, closure: Closure) -> Server:
    return start(
        store=closure.server.directory,
        settings=f"sign_key_paths = ['{closure.key.secret_file}']\naccess_log = true\nnar_compression = 'none'",
    )


def trust(client: Client, server: Server, closure: Closure) -> None:
    client.settings |= {"substituters": server.url, "trusted-public-keys": closure.key.public}


def hash_part(path: str) -> str:
    return path.removeprefix("/nix/store/")[:32]


def requests(server: Server) -> list[tuple[str, int]]:
    """Return all requests with their statuses, sorted. Stops the server, so that the log is complete."""
    server.stop()
    lines = (re.search(r"'(\w+ /\S*)' (\d{3}) ", line) for line in server.log)
    return sorted((line[1], int(line[2])) for line in lines if line and line[1] != "GET /version")


def nar_requests(closure: Closure, paths: list[str]) -> list[str]:
    hashes = closure.server.run("nix-store", "--query", "--hash", *paths).lines
    return [
        f"GET /nar/{hash_part(path)}-{nar_hash.removeprefix('sha256:')}.nar"
        for path, nar_hash in zip(paths, hashes, strict=True)
    ]


def test_cache_below_a_path_of_a_proxy(start: Start, client: Client, closure: Closure, tmp_path: Path) -> None:
    server = serve(start, closure)
    with nginx(tmp_path / "nginx", f"location /a/cache/ {{ proxy_pass {server.url}/; }}") as (url, _):
        client.settings |= {"substituters": f"{url}/a/cache", "trusted-public-keys": closure.key.public}
        client.run("nix-store", "--realise", closure.top)
    assert requisites(client, closure.top) == requisites(closure.server, closure.top)


def test_closure_is_substituted(start: Start, client: Client, closure: Closure) -> None:
    server = serve(start, closure)
    trust(client, server, closure)
    paths = requisites(closure.server, closure.top)
    client.run("nix-store", "--realise", closure.top)

    assert requisites(client, closure.top) == paths
    client.run("nix-store", "--verify-path", *paths)
    client.run("nix", "store", "verify", "--recursive", closure.top)
    # One request for each needed resource, and no other.
    narinfos = [f"GET /{hash_part(path)}.narinfo" for path in paths]
    asked = ["GET /nix-cache-info", *narinfos, *nar_requests(closure, paths)]
    assert requests(server) == sorted((request, 200) for request in asked)


def test_all_paths_are_copied(start: Start, client: Client, closure: Closure) -> None:
    server = serve(start, closure)
    trust(client, server, closure)
    # Nix 2.8 and newer versions disagree on the content address of a path that refers to itself.
    alike = client.nix is closure.server.nix
    paths = [path for name, path in closure.paths.items() if alike or name != "floating-1.0"]
    client.run("nix", "copy", "--from", server.url, *paths)

    client.run("nix-store", "--verify-path", *paths)
    tree = closure.paths["tree-1.0"]
    assert client.run("nix-store", "--dump", tree).stdout == closure.server.run("nix-store", "--dump", tree).stdout
    answered = requests(server)
    narinfos = {f"{method} /{hash_part(path)}.narinfo" for path in paths for method in ("GET", "HEAD")}
    assert {request for request, _ in answered} <= {"GET /nix-cache-info", *narinfos, *nar_requests(closure, paths)}
    assert {status for _, status in answered} == {200}
    # Nix requests narinfos more than once, but each NAR once.
    fetched = [request for request, _ in answered if request.startswith("GET")]
    assert len(fetched) == len(set(fetched)) == 1 + 2 * len(paths)


def test_remote_closure_is_queried_and_verified(start: Start, client: Client, closure: Closure) -> None:
    server = serve(start, closure)
    trust(client, server, closure)
    listed = client.run("nix", "path-info", "--recursive", "--store", server.url, closure.top).lines
    assert sorted(listed) == sorted(requisites(closure.server, closure.top))
    client.run("nix", "store", "verify", "--store", server.url, "--recursive", closure.top)


def test_two_clients_copy_concurrently(start: Start, make_client: MakeClient, closure: Closure) -> None:
    server = serve(start, closure)
    clients = [make_client("one"), make_client("other")]

    def fetch(client: Client) -> None:
        trust(client, server, closure)
        client.run("nix", "copy", "--from", server.url, closure.top)
        client.run("nix-store", "--verify-path", *requisites(client, closure.top))

    with ThreadPoolExecutor() as threads:
        list(threads.map(fetch, clients))


def test_missing_path_is_a_miss(start: Start, client: Client, closure: Closure) -> None:
    server = serve(start, closure)
    trust(client, server, closure)
    missing = "/nix/store/00000000000000000000000000000000-missing"
    found = client.run("nix", "path-info", "--store", server.url, missing, check=False)
    assert found.returncode != 0
    assert f"'{missing}' is not valid" in found.stderr
    assert client.run("nix-store", "--realise", missing, check=False).returncode != 0
    assert {status for request, status in requests(server) if "narinfo" in request} == {404}


@pytest.mark.nix
def test_nars_equal_those_of_nix_store_dump(start: Start, closure: Closure) -> None:
    server = serve(start, closure)
    everything = closure.server.run("nix", "path-info", "--all").lines
    assert set(closure.paths.values()) < set(everything)  # derivations are served, too
    nars = [server.get(request.removeprefix("GET ")) for request in nar_requests(closure, everything)]
    assert all(nar.headers["content-length"] == str(len(nar.body)) for nar in nars)
    dumps = closure.server.run("sh", "-c", 'for path; do nix-store --dump "$path"; done', "sh", *everything)
    assert b"".join(nar.body for nar in nars) == dumps.stdout


@pytest.mark.nix
def test_narinfos_equal_those_of_nix_copy(start: Start, closure: Closure) -> None:
    server = serve(start, closure)
    static = closure.server.shared / "static"
    cache = f"file://{static}?compression=none&secret-key={closure.key.secret_file}"
    closure.server.run("nix", "copy", "--to", cache, *closure.paths.values())
    for narinfo in static.glob("*.narinfo"):
        ours, theirs = fields(server.get(f"/{narinfo.name}").text), fields(narinfo.read_text())
        del ours["URL"], theirs["URL"]
        assert ours == theirs
    assert len(list(static.glob("*.narinfo"))) == len(closure.paths)


def fields(narinfo: str) -> dict[str, list[str]]:
    found = defaultdict(list)
    for line in narinfo.splitlines():
        key, value = line.split(": ", 1)
        found[key].append(value)
    return found


@pytest.mark.slow  # other tests check a size beyond 4 GiB, and memory
@pytest.mark.parametrize("nix", [pytest.param(NIXES[0], id="host", marks=pytest.mark.nix)], indirect=True)
def test_nar_of_5_gib_takes_little_memory(start: Start, client: Client, closure: Closure, sparse_path: str) -> None:
    server = serve(start, closure)
    trust(client, server, closure)
    client.run("nix", "copy", "--from", server.url, closure.paths["dep-1.0"])
    (worker,) = server.workers
    before = peak_bytes(worker)
    try:
        client.run("nix", "copy", "--from", server.url, sparse_path, timeout=600)
        assert (client.real_path(sparse_path) / "zeros").stat().st_size == 5 * 1024 * MEBIBYTE
    finally:
        (client.real_path(sparse_path) / "zeros").unlink(missing_ok=True)  # takes disk space here
    assert peak_bytes(worker) - before < 16 * MEBIBYTE


@pytest.mark.nix
@pytest.mark.parametrize(
    "settings",
    [
        "real_nix_store = '{store}/nix/store'",
        "real_nix_store = '{link}'",
        "real_nix_store = '{link}'\nnix_db_path = '{store}/nix/var/nix/db/db.sqlite'",
    ],
)
def test_chroot_store_is_found(tmp_path: Path, closure: Closure, settings: str) -> None:
    link = tmp_path / "link"
    link.symlink_to(closure.server.store_dir)
    server = Server(tmp_path / "server", tmp_path)
    server.config.write_text("bind = '127.0.0.1:0'\n" + settings.format(store=closure.server.directory, link=link))
    path = closure.paths["file-1.0"]
    server.start()
    try:
        for url in nar_requests(closure, [path]):
            nar = server.get(url.removeprefix("GET "))
            assert nar.body == closure.server.run("nix-store", "--dump", path).stdout
    finally:
        server.stop()

"""Stock Nix reads a bucket that `harmonia mirror` has filled, while no Harmonia runs."""

import http.client
import signal
import threading
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from harmonia.nix import narinfo
from support.closure import Closure, build_one, requisites
from support.cutting_proxy import CuttingProxy
from support.mirrors import gates
from support.nginx import nginx
from support.nix_client import Client
from support.running import PATIENCE_S, run
from support.s3_service import S3, Folder

pytestmark = pytest.mark.s3

MEBIBYTE = 1 << 20


def mirror(closure: Closure, folder: Folder, directory: Path, *paths: str) -> None:
    """Write closures of paths in the closure's store to the bucket."""
    config = directory / "mirror.toml"
    server = closure.server
    config.write_text(
        f"real_nix_store = '{server.store_dir}'\nnix_db_path = '{server.db_path}'\nlog_dir = '{server.log_dir}'\n"
        f"cache_dir = '{directory}/mirror-cache'\nsign_key_paths = ['{closure.key.secret_file}']\n{folder.settings()}"
    )
    answer = run("--config", str(config), "mirror", *paths)
    assert answer.returncode == 0, answer.stderr


def test_closure_is_substituted_from_the_bucket_alone(
    client: Client, closure: Closure, folder: Folder, tmp_path: Path
) -> None:
    mirror(closure, folder, tmp_path, closure.top)
    client.settings |= {"substituters": folder.url, "trusted-public-keys": closure.key.public}
    client.run("nix-store", "--realise", closure.top)
    paths = requisites(client, closure.top)
    assert paths == requisites(closure.server, closure.top)
    client.run("nix-store", "--verify-path", *paths)
    client.run("nix", "store", "verify", "--recursive", "--store", folder.url, closure.top)
    assert client.run("nix", "store", "ls", "--store", folder.url, closure.top).lines
    assert client.run("nix", "log", "--store", folder.url, closure.top).text


def test_closure_is_copied_from_the_bucket(
    make_client: Callable[[str], Client], closure: Closure, folder: Folder, tmp_path: Path
) -> None:
    client = make_client("copier")
    alike = client.nix.version < (2, 9)  # later versions hash self-references differently, and refuse floating-1.0
    paths = [path for name, path in closure.paths.items() if alike or name != "floating-1.0"]
    mirror(closure, folder, tmp_path, *paths)
    client.settings["trusted-public-keys"] = closure.key.public
    client.run("nix", "copy", "--from", folder.url, *paths)
    client.run("nix-store", "--verify-path", *requisites(client, closure.top))


@pytest.mark.parametrize("more", ["", "redirect = true"], ids=["proxied", "redirected"])
def test_closure_is_substituted_through_a_gate_without_a_store(
    client: Client, closure: Closure, s3_service: S3, tmp_path: Path, *, more: str
) -> None:
    folder = s3_service.folder(tmp_path, "private")
    mirror(closure, folder, tmp_path, closure.top)
    with gates(folder, closure.key.public.strip(), tmp_path, 1, more) as [gate]:
        client.settings |= {"substituters": gate.url, "trusted-public-keys": closure.key.public}
        client.run("nix-store", "--realise", closure.top)
        client.run("nix-store", "--verify-path", *requisites(client, closure.top))
        assert client.run("nix", "log", "--store", gate.url, closure.top).text


def test_cut_download_resumes_at_another_gate_while_one_is_killed(
    client: Client, closure: Closure, s3_service: S3, tmp_path: Path
) -> None:
    folder = s3_service.folder(tmp_path, "private")
    path = build_one(closure.server, "noise-3.0", "mkdir $out; head -c 12000000 /dev/urandom > $out/noise")
    mirror(closure, folder, tmp_path, path)
    with gates(folder, closure.key.public.strip(), tmp_path, 3) as servers:
        pool = "".join(f"server {server.url.removeprefix('http://')}; " for server in servers)
        place = "location / { proxy_pass http://gates; proxy_http_version 1.1; proxy_buffering off; }"
        with nginx(tmp_path / "nginx", place, f"upstream gates {{ {pool} }}") as (url, log):

            def kill_one() -> None:
                servers[0].process.kill()

            with CuttingProxy(int(url.rpartition(":")[2]), 2 * MEBIBYTE, 8 * MEBIBYTE, kill_one) as network:
                client.settings |= {"substituters": network.url, "trusted-public-keys": closure.key.public}
                client.run("nix-store", "--realise", path)
                client.run("nix-store", "--verify-path", path)
                assert network.cuts >= 2
        assert " 206 " in log.read_text()


@pytest.mark.slow
def test_fifty_downloads_end_whole_although_one_of_three_gates_is_killed(
    closure: Closure, s3_service: S3, tmp_path: Path
) -> None:
    """A client resumes as Nix does: with the range that is missing, at whichever gate nginx chooses."""
    folder = s3_service.folder(tmp_path, "private")
    path = build_one(closure.server, "noise-4.0", "mkdir $out; head -c 12000000 /dev/urandom > $out/noise")
    mirror(closure, folder, tmp_path, path)
    [(_, nar)] = folder.paths().values()
    expected = folder.get(nar.url)
    with gates(folder, closure.key.public.strip(), tmp_path, 3) as servers:
        pool = "".join(f"server {server.url.removeprefix('http://')}; " for server in servers)
        place = "location / { proxy_pass http://gates; proxy_http_version 1.1; proxy_buffering off; }"
        with nginx(tmp_path / "nginx", place, f"upstream gates {{ {pool} }}") as (url, log):
            [file] = {
                narinfo.parse(server.get(f"/{path[11:43]}.narinfo").text, "/nix/store")[1].url for server in servers
            }
            begun = threading.Barrier(51)

            def download() -> tuple[bytes, int]:
                content, attempts, has_begun = b"", 0, False
                while len(content) < len(expected):
                    attempts += 1
                    request = urllib.request.Request(f"{url}/{file}", headers={"Range": f"bytes={len(content)}-"})
                    with suppress(OSError, http.client.HTTPException), urllib.request.urlopen(request) as answer:
                        content += answer.read(100_000)
                        if not has_begun:
                            has_begun = True
                            begun.wait(PATIENCE_S)
                        while chunk := answer.read1(1 << 20):
                            content += chunk
                return content, attempts

            with ThreadPoolExecutor(50) as clients:
                downloads = [clients.submit(download) for _ in range(50)]
                begun.wait(PATIENCE_S)
                servers[0].stop(signal.SIGKILL)
                results = [each.result() for each in downloads]
        assert all(content == expected for content, _ in results)
        assert any(attempts > 1 for _, attempts in results)
        assert " 206 " in log.read_text()


def test_closure_is_copied_from_the_bucket_by_s3(
    make_client: Callable[[str], Client], closure: Closure, folder: Folder, tmp_path: Path
) -> None:
    """Debian builds Nix without support for credentials, which a public bucket does not need."""
    client = make_client("copier")
    if client.nix.version < (2, 34):
        pytest.skip("Debian builds this version of Nix without s3://")
    mirror(closure, folder, tmp_path, closure.top)
    url = f"s3://{folder.bucket}/{folder.prefix}?scheme=http&endpoint={folder.endpoint.removeprefix('http://')}"
    client.settings["trusted-public-keys"] = closure.key.public
    client.run("nix", "copy", "--from", url, closure.top)
    paths = requisites(client, closure.top)
    assert paths == requisites(closure.server, closure.top)
    client.run("nix-store", "--verify-path", *paths)
    client.run("nix", "store", "verify", "--recursive", "--store", url, closure.top)

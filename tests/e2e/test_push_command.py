"""Each version of Nix reads what `harmonia push` writes: to a Harmonia, to nginx, and to a plain store of files."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from support.closure import Closure, make_closure
from support.nginx import nginx
from support.nix_client import Client
from support.push_target import Target
from support.put_server import put_server
from support.running import run

MakeClient = Callable[[str], Client]


@contextmanager
def files_behind_nginx(directory: Path) -> Iterator[str]:
    (directory / "files").mkdir()
    server = f"root {directory}/files; location / {{ dav_methods PUT; create_full_put_path on; }}"
    with nginx(directory / "nginx", server) as (url, _):
        yield url


@contextmanager
def plain_files(directory: Path) -> Iterator[str]:
    with put_server(directory / "plain") as server:
        yield server.url


def push(pusher: Client, url: str, *arguments: object) -> str:
    config = pusher.directory / "harmonia.toml"
    config.write_text(f"real_nix_store = '{pusher.store_dir}'\nnix_db_path = '{pusher.db_path}'\n")
    environment = {"NETRC": str(pusher.shared / "netrc")}
    answer = run("--config", str(config), "push", url, *map(str, arguments), environment=environment)
    assert answer.returncode == 0, answer.stderr
    return answer.stderr


def substitute(consumer: Client, url: str, key: str, path: str) -> None:
    consumer.settings |= {"substituters": url, "trusted-public-keys": key}
    consumer.settings["netrc-file"] = str(consumer.shared / "netrc")
    consumer.run("nix-store", "--realise", path)
    consumer.run("nix-store", "--verify", "--check-contents")


@pytest.mark.parametrize("serve", [files_behind_nginx, plain_files])
def test_pushed_closure_is_substituted_from_files(
    serve: Callable[[Path], AbstractContextManager[str]], make_client: MakeClient, closure: Closure, tmp_path: Path
) -> None:
    consumer = make_client("consumer")
    with serve(tmp_path) as url:
        push(closure.server, url, *closure.paths.values(), "--key", closure.key.secret_file)
        for path in (closure.top, closure.paths["added-1.0"], closure.paths["flat-1.0"]):
            substitute(consumer, url, closure.key.public, path)


def test_pushed_closure_is_substituted_from_a_harmonia(target: Target, pusher: Client, make_client: MakeClient) -> None:
    closure = make_closure(pusher)
    server = target.serve()
    with target.client.daemon():
        stderr = push(pusher, f"{server.url}/push", closure.top, "--key", target.key.secret_file)
        assert " pushed, 0 already there" in stderr
        assert "0 pushed, " in push(pusher, f"{server.url}/push", closure.top)
        target.client.run("nix-store", "--gc")  # the closure is kept by GC roots
    target.client.run("nix-store", "--verify-path", closure.top)
    substitute(make_client("consumer"), server.url, target.key.public, closure.top)
    server.stop()
    assert not [line for line in server.log if "Traceback" in line or "ERROR" in line], server.log

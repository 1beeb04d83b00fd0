"""A build on one machine is substitutable from another at once, with `harmonia watch` and the post-build hook."""

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

import harmonia.hook
from support import preloaded
from support.closure import build_one
from support.nix_client import Client
from support.push_target import Target
from support.running import wait_until

MakeClient = Callable[[str], Client]


@contextmanager
def watching(builder: Client, url: str, settings: str, key: Path) -> Iterator[Path]:
    """Run a watcher of the builder's store. Yield its log."""
    config, log = builder.shared / "watch.toml", builder.shared / "watch.log"
    config.write_text(
        f"real_nix_store = '{builder.store_dir}'\nnix_db_path = '{builder.db_path}'\n"
        f"[watch]\nurl = '{url}'\nnetrc = '{builder.shared}/netrc'\nstate_dir = '{builder.shared}/watch'\n"
        f"socket = '{builder.shared}/watch.socket'\n{settings}\n"
    )
    command = [*preloaded.HARMONIA, "--config", str(config), "watch", "--key", str(key)]
    with log.open("w") as stderr, preloaded.popen(command, env=os.environ, stderr=stderr) as process:
        try:
            wait_until(lambda: "uploading new paths" in log.read_text())
            yield log
        finally:
            process.terminate()
            assert process.wait(60) == 0


@pytest.mark.parametrize("with_hook", [False, True], ids=["watch", "hook"])
def test_build_is_substitutable_from_another_machine(
    target: Target, pusher: Client, make_client: MakeClient, tmp_path: Path, *, with_hook: bool
) -> None:
    pusher.run("nix-store", "--init")
    consumer = make_client("consumer")
    consumer.settings["netrc-file"] = str(pusher.shared / "netrc")
    server = target.serve()
    consumer.settings |= {"substituters": server.url, "trusted-public-keys": target.key.public}
    if with_hook:
        if not (pusher.nix.root / "usr/bin/python3").exists():
            pytest.skip("no Python on this machine")
        shutil.copy(harmonia.hook.__file__, tmp_path / "hook.py")
        hook = tmp_path / "hook"
        hook.write_text(f"#!/bin/sh\nexec /usr/bin/python3 -I {tmp_path}/hook.py {tmp_path}/watch.socket\n")
        hook.chmod(0o755)
        pusher.settings["post-build-hook"] = str(hook)
    settings = f"new_paths = {'false' if with_hook else 'true'}"
    with target.client.daemon(), watching(pusher, f"{server.url}/push", settings, target.key.secret_file) as log:
        library = build_one(pusher, "library-1.0", "echo library > $out")
        path = build_one(pusher, "app-1.0", f"echo {library} > $out; head -c 1000000 /dev/urandom >> $out")
        wait_until(lambda: is_valid(target.client, path))
        consumer.run("nix-store", "--realise", path)
        consumer.run("nix-store", "--verify", "--check-contents")
    assert "ERROR" not in log.read_text()
    assert not [line for line in server.log if "Traceback" in line or "ERROR" in line], server.log


def is_valid(client: Client, path: str) -> bool:
    """Return True if a path is in the database of a client, without the start of a Nix."""
    with closing(sqlite3.connect(f"file:{client.db_path}?mode=ro", uri=True)) as connection:
        return bool(connection.execute("select 1 from ValidPaths where path = ?", (path,)).fetchall())

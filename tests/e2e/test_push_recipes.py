"""The recipes of docs/how-to/push.md, run by a shell: what they build is in the target's store afterwards."""

import re
from pathlib import Path

import pytest

from support.nix_client import Client
from support.push_target import Target
from support.running import Server

_HOW_TO = Path(__file__).parents[2] / "docs/how-to/push.md"
_PACKAGE = """
    derivation {
      name = "app-1.0"; system = builtins.currentSystem; builder = "/bin/sh"; args = [ "-c" "echo app > $out" ];
    }"""


@pytest.fixture
def ci(pusher: Client, target: Target) -> Client:
    """Return a machine for CI with a package to build. Its `nix build` needs no flake."""
    pusher.settings["netrc-file"] = "/etc/nix/netrc"
    for directory in ("etc/nix", "root/bin", "root/app"):
        (pusher.directory / directory).mkdir(parents=True)
    (pusher.directory / "root/app/default.nix").write_text(_PACKAGE)
    scripts = {
        "nix": 'if [ "$1" = build ]; then shift; exec nix-build "$@"; fi\nexec /usr/bin/nix "$@"\n',
        "sudo": 'exec "$@"\n',
    }
    for name, script in scripts.items():
        (pusher.directory / "root/bin" / name).write_text(f"#!/bin/sh\n{script}")
        (pusher.directory / "root/bin" / name).chmod(0o755)
    (pusher.directory / "root/ci.secret").write_text(target.key.secret_file.read_text())
    return pusher


def recipe(heading: str, server: Server) -> str:
    """Return the block of code below a heading, for `server`."""
    match = re.search(rf"^## {heading}$.*?^```text\n(.*?)^```$", _HOW_TO.read_text(), re.DOTALL | re.MULTILINE)
    assert match
    block = match[1].replace("https://cache.example.org", server.url)
    return block.replace("cache.example.org", "127.0.0.1")


def run_in_ci(ci: Client, script: str, **variables: str) -> None:
    environment = {"PATH": f"/root/bin:{ci.environment['PATH']}", **variables}
    ci.run("sh", "-ec", f"cd /root/app\n{script}", environment=environment)


def assert_app_is_pushed(target: Target) -> None:
    (path,) = [line for line in target.client.run("nix-store", "--dump-db").lines if line.endswith("-app-1.0")]
    target.client.run("nix-store", "--verify-path", path)


def test_github_recipe_pushes_the_build(target: Target, ci: Client) -> None:
    server = target.serve()
    commands = re.sub(r"^(- run: \|\n| {4})", "", recipe("GitHub Actions", server), flags=re.MULTILINE)
    token, key = (target.client.shared / "token").read_text(), target.key.secret_file.read_text()
    commands = commands.replace("${{ secrets.CACHE_TOKEN }}", token).replace("${{ secrets.CACHE_KEY }}", key)
    with target.client.daemon():
        run_in_ci(ci, commands, RUNNER_TEMP="/tmp")
    assert_app_is_pushed(target)


def test_gitlab_recipe_pushes_the_build(target: Target, ci: Client) -> None:
    server = target.serve()
    commands = re.findall(r"^    - (.*)$", recipe("GitLab CI", server), re.MULTILINE)
    token = (target.client.shared / "token").read_text()
    with target.client.daemon():
        run_in_ci(ci, "\n".join(commands), CACHE_TOKEN=token, CACHE_KEY_FILE="/root/ci.secret")
    assert_app_is_pushed(target)

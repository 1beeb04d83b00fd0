"""The commands of docs/tutorial.md work, with a store, a port and a client of the test."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.pages import BLOCKS
from support.programs import needs
from support.running import PATIENCE_S, wait_until

pytestmark = [pytest.mark.nix, needs("nix-store"), needs("curl")]

PAGE = [block for block in BLOCKS if block.page == "docs/tutorial.md"]
COMMANDS = [line for block in PAGE if block.language == "console" for line in re.findall(r"(?m)^# (.*)$", block.text)]
UPSTREAM, TOKENS = (block.text for block in PAGE if block.language == "toml")
URLS = ("http://localhost:5000", "http://cache.example.org:5000")


class Team:
    """The machine of the server, and a client with its own store."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.url = URLS[0]
        self.settings = directory / "harmonia.toml"
        program = directory / "bin/harmonia"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m harmonia "$@"\n')
        program.chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{program.parent}:{os.environ['PATH']}",
            "HOME": str(directory),
            "NIX_REMOTE": f"local?root={directory}/server",
            "NIX_CONFIG": "build-users-group =\nsubstituters =\n",
        }

    def run(self, beginning: str, *, client: str = "") -> str:
        """Run the last command with this beginning, on a client if its nix.conf is given; return its output."""
        command = [each for each in COMMANDS if each.startswith(beginning)][-1]
        for url in URLS:
            command = command.replace(url, self.url)
        environment = dict(self.environment)
        if client:
            environment["NIX_REMOTE"] = f"local?root={self.directory}/client"
            environment["NIX_CONFIG"] += client
        command = command.replace("/etc/nix/netrc", "netrc")
        done = subprocess.run(
            command, shell=True, cwd=self.directory, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout + done.stderr

    @contextmanager
    def served(self) -> Iterator[None]:
        server = subprocess.Popen(
            "exec harmonia --config harmonia.toml",
            shell=True,
            cwd=self.directory,
            env=self.environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert server.stderr is not None
        try:
            found = re.search(r" at (http://\S+)", server.stderr.readline())
            assert found
            self.url = found[1]
            ask = ["curl", "--fail", "--silent", "--output", "/dev/null", f"{self.url}/health"]
            wait_until(lambda: subprocess.run(ask, check=False).returncode == 0)
            yield
        finally:
            server.send_signal(signal.SIGTERM)
            server.communicate(timeout=PATIENCE_S)


def test_team_gets_a_private_cache(tmp_path: Path) -> None:
    team = Team(tmp_path)
    assert "harmonia --config harmonia.toml" in COMMANDS
    for beginning in ("harmonia keygen", 'echo "sign_key_paths', 'echo "Hello'):
        team.run(beginning)
    path = team.run("nix-store --add").strip()
    own = f"bind = '127.0.0.1:0'\nreal_nix_store = '{tmp_path}/server/nix/store'\ndaemon_socket = ''\n"
    team.settings.write_text(own + team.settings.read_text())
    team.run("harmonia --config harmonia.toml check-config")

    with team.served():
        assert (
            team.run("harmonia --config harmonia.toml doctor").splitlines()[-1]
            == "0 errors, 0 warnings, 15 checks passed"
        )
        key = (tmp_path / "cache.example.org-1.public").read_text()
        trusting = f"substituters = {team.url}\ntrusted-public-keys = {key}\nnarinfo-cache-negative-ttl = 0\n"
        assert f"copying path '{path}' from" in team.run("nix-store --realise", client=trusting)
        assert (tmp_path / f"client{path}").read_text() == "Hello, team\n"

    team.settings.write_text(team.settings.read_text() + UPSTREAM)
    with team.served():
        assert "upstream https://cache.nixos.org" in team.run("curl 'http://localhost:5000/health")

    token = team.run("harmonia token")
    [hashed] = re.findall(r"(?m)^  (\S+  read  sha256:\S+)$", token)
    (tmp_path / "tokens").write_text(f"{hashed}\n")
    [login] = re.findall(r"(?m)^  (machine cache\.example\.org .*)$", token)
    (tmp_path / "netrc").write_text(login.replace("cache.example.org", "127.0.0.1"))
    team.settings.write_text(TOKENS.replace("/etc/harmonia/tokens", "tokens") + team.settings.read_text())
    with team.served():
        assert "StoreDir: /nix/store" not in team.run("curl http://cache.example.org:5000/nix-cache-info")
        assert "StoreDir: /nix/store" in team.run("curl --netrc-file")

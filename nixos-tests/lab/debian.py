# mypy: ignore-errors
# ruff: noqa: F821 - the driver runs this script, and defines these names
"""Test script: the commands of docs/how-to/debian.md, run as written, result in a cache that a client can use."""

import re

GUIDE = "/run/guest/harmonia-debian/project/docs/how-to/debian.md"
LOG = "journalctl --unit=harmonia.service --output=cat"


def commands(beginning: str) -> list[str]:
    """Return root's commands of the block that begins so, without apt-get, because there is no network."""
    [block] = re.findall(rf"^```console\n(# {beginning}\n.*?)^```", guide, re.DOTALL | re.MULTILINE)
    return [line.removeprefix("# ") for line in block.splitlines() if not line.startswith("# apt-get ")]


def type_in(commands: list[str]) -> None:
    for command in commands:
        server.succeed(f"cd /root/project && PIP_NO_INDEX=1 PIP_FIND_LINKS={wheels} {command}")


def download(size: str) -> str:
    """Download a new random file of that size to a client that requires signatures. Return the server's log."""
    path = server.succeed(f"head --bytes={size} /dev/urandom >/tmp/file; nix-store --add /tmp/file").strip()
    client.fail(f"test -e {path}")
    client.succeed(
        f"nix-store --realise {path} --option substituters http://server:5000 --option trusted-public-keys"
        f" {server.succeed('cat /etc/harmonia/cache.public').strip()} >&2"
    )
    assert client.succeed(f"nix-hash --type sha256 {path}") == server.succeed(f"nix-hash --type sha256 {path}")
    return server.succeed(LOG)


start_all()
guide = server.succeed(f"cat {GUIDE}")
wheels = "/run/guest/harmonia-debian/wheels/$(. /etc/os-release && echo $VERSION_CODENAME)"
# pip writes to the project. Nix creates its database when root first uses it. The socket is as Debian installs it.
server.succeed(
    "cp --recursive /run/guest/harmonia-debian/project /root",
    "nix-store --init",
    "chgrp nix-users /nix/var/nix/daemon-socket; chmod 770 /nix/var/nix/daemon-socket",
)

with subtest("each command works"):
    type_in(commands("apt-get install python3-venv"))

with subtest("the exposure of the service is that on NixOS"):
    assert " 0.3 " in server.succeed("systemd-analyze security --no-pager harmonia.service | tail --lines=1")

with subtest("a client substitutes"):
    download("1M")
    server.wait_until_succeeds(f"{LOG} | grep 'the Nix daemon' >&2", timeout=60)  # lines reach the journal late

with subtest("commands find the settings of the service"):
    path = server.succeed("nix-store --add /etc/os-release").strip()
    for command in "check-config", "doctor", f"verify {path}", f"warm {path}":
        server.succeed(f"/opt/harmonia/bin/harmonia {command} >&2")

with subtest("the guide's remedy for the warning about the daemon works"):
    server.succeed("journalctl --rotate; journalctl --vacuum-time=1s")
    type_in(commands("mkdir -p /etc/systemd/system/harmonia.service.d"))
    assert "WARNING" not in download("2M")

with subtest("the units start at boot, as documented"):
    for unit in ("harmonia.socket", "harmonia.service"):
        assert server.succeed(f"systemctl is-enabled {unit}") == "enabled\n"

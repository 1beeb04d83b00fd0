# mypy: ignore-errors
# ruff: noqa: F821 - the driver runs it, and has what these names mean
"""A test script: the commands of docs/how-to/debian.md, word by word, give a cache that a client can use."""

import re

GUIDE = "/run/guest/harmonia-debian/project/docs/how-to/debian.md"


def commands(beginning: str) -> list[str]:
    """Those that root types in the part of the guide that begins so, but for apt-get: there is no network here."""
    [block] = re.findall(rf"^```console\n(# {beginning}\n.*?)^```", guide, re.DOTALL | re.MULTILINE)
    return [line.removeprefix("# ") for line in block.splitlines() if not line.startswith("# apt-get ")]


def type_in(commands: list[str]) -> None:
    for command in commands:
        server.succeed(f"cd /root/project && PIP_NO_INDEX=1 PIP_FIND_LINKS={wheels} {command}")


def download(size: str) -> str:
    """A client that requires signatures gets a file of that size, which the server has just made."""
    path = server.succeed(f"head --bytes={size} /dev/urandom >/tmp/file; nix-store --add /tmp/file").strip()
    client.fail(f"test -e {path}")
    client.succeed(
        f"nix-store --realise {path} --option substituters http://server:5000 --option trusted-public-keys"
        f" {server.succeed('cat /etc/harmonia/cache.public').strip()} >&2"
    )
    assert client.succeed(f"nix-hash --type sha256 {path}") == server.succeed(f"nix-hash --type sha256 {path}")
    return server.succeed("journalctl --unit=harmonia.service --output=cat")


start_all()
guide = server.succeed(f"cat {GUIDE}")
wheels = "/run/guest/harmonia-debian/wheels/$(. /etc/os-release && echo $VERSION_CODENAME)"
# pip writes there; Nix makes its database when root first uses it; and this is as Debian has it.
server.succeed(
    "cp --recursive /run/guest/harmonia-debian/project /root",
    "nix-store --init",
    "chgrp nix-users /nix/var/nix/daemon-socket; chmod 770 /nix/var/nix/daemon-socket",
)

with subtest("each command works"):
    type_in(commands("apt-get install python3-venv"))

with subtest("the service is what it is on NixOS"):
    assert " 0.3 " in server.succeed("systemd-analyze security --no-pager harmonia.service | tail --lines=1")

with subtest("a client substitutes"):
    assert "the Nix daemon" in download("1M")

with subtest("commands find the settings of the service"):
    path = server.succeed("nix-store --add /etc/os-release").strip()
    for command in "check-config", "doctor", f"verify {path}", f"warm {path}":
        server.succeed(f"/opt/harmonia/bin/harmonia {command} >&2")

with subtest("what is told of the daemon helps"):
    server.succeed("journalctl --rotate; journalctl --vacuum-time=1s")
    type_in(commands("mkdir -p /etc/systemd/system/harmonia.service.d"))
    assert "WARNING" not in download("2M")

with subtest("what the documentation tells of a start after a boot is so"):
    for unit in ("harmonia.socket", "harmonia.service"):
        assert server.succeed(f"systemctl is-enabled {unit}") == "enabled\n"

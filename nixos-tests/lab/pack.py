"""Packer of tests for the driver: pack.py OUT BUNDLE..., run in the root file system that built the bundles.

A bundle is the output of eval/bundle.nix for a test. OUT gets a `store` with the store paths of all machines. For each
test it gets a directory with `test.py`, `machines.json` (names and addresses) and, for each machine, `registration`
(input of `nix-store --load-db`) and `setup.sh` (applies the NixOS configuration to a Debian machine).
"""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STORE_PATH = re.compile(r"/nix/store/[a-z0-9]{32}-[A-Za-z0-9+._?=-]+")
UNITS = "/etc/systemd/system"
# No sandbox, because nested namespaces may be forbidden. No build users, because Nix kills all processes of a build
# user that it sees, and a Nix outside of a container sees the processes inside.
SETTINGS = "sandbox = false\nbuild-users-group =\n"


def quoted(command: str, *words: str) -> str:
    return " ".join((command, *map(shlex.quote, words)))


def install(paths: list[str], registration: str) -> Iterator[str]:
    if paths:
        yield quoted(
            "mkdir -p /nix/store && cp -a", *(f"/run/guest/store/{Path(path).name}" for path in paths), "/nix/store/"
        )
        yield f"nix-store --load-db <{registration}"


def users(node: dict[str, Any]) -> Iterator[str]:
    for group in node["groups"]:
        yield f"{quoted('getent group', group)} >&2 || {quoted('groupadd -r', group)}"
    for user in node["users"]:
        name, home = user["name"], user["home"]
        yield f"{quoted('id', name)} >&2 || {quoted('useradd -r -g', user['group'] or 'nogroup', '-d', home, name)}"
        for group in user["extraGroups"]:
            yield quoted("usermod -aG", group, name)
        if user["createHome"]:
            yield quoted("install -d -o", name, home)


def files(node: dict[str, Any]) -> Iterator[str]:
    for target, entry in node["etc"].items():
        path, source = f"/etc/{target}", entry["source"]
        yield quoted("rm -rf", path)
        if target == "nix/nix.conf":  # with settings that a container needs
            yield f"{quoted('install -D -m 644', source, path)}; {quoted('printf %s', SETTINGS)} >>{path}"
        elif entry["mode"] in {"symlink", "direct-symlink"}:
            yield quoted("mkdir -p", str(Path(path).parent)) + "; " + quoted("ln -s", source, path)
        else:
            owner, group = (entry[key].lstrip("+") for key in ("user", "group"))
            yield quoted("install -D -m", entry["mode"], "-o", owner, "-g", group, source, path)
    if rules := node["tmpfiles"]:
        yield quoted("printf '%s\\n'", *rules) + " >/etc/tmpfiles.d/nixos.conf"
        yield "systemd-tmpfiles --create nixos.conf"
    yield quoted("printf %s", node["hosts"]) + " >>/etc/hosts"
    yield "mkdir -p /run/current-system/sw/bin"
    for package in node["packages"]:
        # The bin of a stub package is a link to the machine's own /usr/bin.
        yield f"[ -L {package}/bin ] || ln -sf {package}/bin/* /run/current-system/sw/bin/"


def units(node: dict[str, Any]) -> Iterator[str]:
    wanted = set()
    for name, unit in node["units"].items():
        text = Path(unit["file"]).read_text()
        if name.endswith(".service") and not re.search("^Exec(Start|Stop)=", text, re.MULTILINE):
            yield quoted(
                "install -D", unit["file"], f"{UNITS}/{name}.d/nixos.conf"
            )  # a drop-in for a unit that Debian has
        else:
            yield quoted("ln -sf", unit["file"], f"{UNITS}/{name}")
        for kind, targets in (("wants", unit["wantedBy"]), ("requires", unit["requiredBy"])):
            for target in targets:
                yield quoted("mkdir -p", f"{UNITS}/{target}.{kind}")
                yield quoted("ln -sf", f"../{name}", f"{UNITS}/{target}.{kind}/{name}")
                if target.endswith(".target"):
                    wanted.add(name)
        for alias in unit["aliases"]:
            yield quoted("ln -sf", name, f"{UNITS}/{alias}")
    yield "systemctl daemon-reload"
    yield "systemctl try-restart nix-daemon.service"  # Debian's daemon started before nix.conf was written
    if wanted:
        yield quoted("systemctl start --no-block", *sorted(wanted))


def closure(node: dict[str, Any]) -> list[str]:
    roots = sorted(set(STORE_PATH.findall(json.dumps(node))))
    return output_of("nix-store", "--query", "--requisites", *roots).split() if roots else []


def output_of(*command: str) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def pack(bundle: dict[str, Any], out: Path, store: Path) -> None:
    for name, node in bundle["nodes"].items():
        if node["failed"]:
            sys.exit(f"{bundle['name']}: {name}: {'; '.join(node['failed'])}")
        machine = out / name
        machine.mkdir(parents=True)
        paths = closure(node)
        missing = [path for path in paths if not (store / Path(path).name).exists()]
        if missing:
            subprocess.run(["cp", "-a", *missing, store], check=True)
        (machine / "registration").write_text(output_of("nix-store", "--dump-db", *paths) if paths else "")
        script = ["set -eu", *install(paths, f"/run/guest/{out.name}/{name}/registration")]
        script += [*users(node), *files(node), *node["activation"], *units(node)]
        (machine / "setup.sh").write_text("\n".join(script) + "\n")
    (out / "machines.json").write_text(json.dumps({name: node["addresses"] for name, node in bundle["nodes"].items()}))
    (out / "test.py").write_text(bundle["testScript"])


def main(out: Path, bundles: list[Path]) -> None:
    store = out / "store"
    store.mkdir(parents=True)
    for path in bundles:
        bundle = json.loads((path / "bundle.json").read_text())
        pack(bundle, out / bundle["name"], store)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(path) for path in sys.argv[2:]])

"""The commands and configurations in README.md work, in their order."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path

import pytest

from harmonia.nix import narinfo
from harmonia.nix.signing import PublicKey
from harmonia.tools.store_builder import StoreBuilder
from support.nixos_machine import evaluate, needs_nix
from support.pages import BLOCKS, ROOT
from support.programs import needs
from support.running import PATIENCE_S, wait_until


def block(language: str, *, after: str) -> str:
    """Return the first block of that language after the heading."""
    line = (ROOT / "README.md").read_text().splitlines().index(after) + 1
    return next(
        each.text for each in BLOCKS if (each.page, each.language) == ("README.md", language) and each.line > line
    )


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which `harmonia` is this program."""
    program = tmp_path / "bin/harmonia"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m harmonia "$@"\n')
    program.chmod(0o755)
    return {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "HOME": str(tmp_path)}


def test_key_is_created_and_used(tmp_path: Path, environment: dict[str, str]) -> None:
    store = StoreBuilder(tmp_path / "store")
    info = store.add_text("text", b"text\n")
    *first, serve = re.findall(r"(?m)^\$ (.*)$", block("console", after="## Sign what you serve"))
    here = f"real_nix_store = '{store.real_dir}'\nbind = '127.0.0.1:0'\n"
    for command in first:
        subprocess.run(command, shell=True, cwd=tmp_path, env=environment, check=True, capture_output=True)
        settings = tmp_path / "harmonia.toml"
        if settings.exists() and here not in settings.read_text():
            settings.write_text(settings.read_text() + here)
    server = subprocess.Popen(
        f"exec {serve}", shell=True, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    assert server.stderr is not None
    try:
        url = re.search(r" at (http://\S+)", server.stderr.readline())
        assert url
        wait_until(lambda: urllib.request.urlopen(f"{url[1]}/health", timeout=PATIENCE_S).status == 200)
        with urllib.request.urlopen(f"{url[1]}/{info.path.hash_part}.narinfo", timeout=PATIENCE_S) as answer:
            served, _ = narinfo.parse(answer.read().decode(), "/nix/store")
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=PATIENCE_S)
    public = (tmp_path / "cache.example.org-1.public").read_text()
    assert [PublicKey.parse(public).verify(served.fingerprint("/nix/store"), sig) for sig in served.sigs] == [True]
    # nix.conf names that key.
    assert f"= {public.partition(':')[0]}:…" in block("nix.conf", after="## Sign what you serve")


def test_make_reports_a_too_old_python(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    command = ["make", "serve", "PYTHON=false"]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert made.returncode == 2
    assert made.stderr.startswith("false is not Python 3.11 or newer; choose one: make serve PYTHON=python3.11\n")
    assert not (tmp_path / ".venv").exists()
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert needed == ">=3.11"


def in_copy_of_make(directory: Path, *arguments: str) -> str:
    """Return the output of make, with programs that only print their arguments."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, directory)
    program = directory / "program"
    program.write_text(
        '#!/bin/sh\necho "$(basename "$0") $*"\n'
        'case $* in "-m venv "*) mkdir -p .venv/bin; cp "$0" .venv/bin/pip; cp "$0" .venv/bin/harmonia;; esac\n'
    )
    program.chmod(0o755)
    command = ["make", *arguments, f"PYTHON={program}"]
    # A nested make would print the directories that it enters and leaves.
    own = {
        name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "BIND"}
    }
    return subprocess.run(command, cwd=directory, env=own, capture_output=True, text=True, check=True).stdout


def test_make_announces_the_download(tmp_path: Path) -> None:
    output = in_copy_of_make(tmp_path, ".venv/ready")
    assert 0 < output.index("Downloading the dependencies from PyPI into .venv") < output.index("pip install")


@pytest.mark.parametrize(("given", "options"), [([], ""), (["BIND=:8080"], " --bind :8080")])
def test_make_serves_at_bind(tmp_path: Path, given: list[str], options: str) -> None:
    demo = in_copy_of_make(tmp_path, "demo", *given).splitlines()
    assert f"harmonia demo{options} demo-store" in demo
    assert demo[-1] == f"harmonia --config demo-store/harmonia.toml serve{options}"
    if Path("/nix/var/nix/db/db.sqlite").exists():
        assert in_copy_of_make(tmp_path, "serve", *given).splitlines()[-1] == f"harmonia serve{options}"
    else:
        assert in_copy_of_make(tmp_path, "serve", *given).splitlines()[-1] == demo[-1]


@needs("git")
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no Git repository here: run make test in a clone")
def test_files_created_in_a_clone_are_ignored_by_git() -> None:
    made = ["harmonia.toml", "cache.example.org-1.secret", "cache.example.org-1.public"]
    ignored = subprocess.run(["git", "check-ignore", *made], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ignored.stdout.split() == made


@needs_nix
@pytest.mark.nix
def test_nixos_blocks_configure_a_server_and_a_client() -> None:
    server = block("nix", after="## NixOS server").replace("./harmonia/module.nix", str(ROOT / "module.nix"))
    client = block("nix", after="## NixOS client")
    made = evaluate(f"""
      let
        machine = block: (import {ROOT}/nixos-tests/eval {{ }}).configure {{
          imports = [ block ];
          boot.isContainer = true;
          system.stateVersion = "25.05";
        }};
        server = machine ({server});
      in {{
        failed = map (each: each.message) (builtins.filter (each: !each.assertion) server.assertions);
        ports = server.networking.firewall.allowedTCPPorts;
        service = server.systemd.units."harmonia.service".text;
        client = (machine ({client})).nix.settings;
      }}
    """)
    assert made["failed"] == []
    assert made["ports"] == [5000]
    assert "LoadCredential=sign-key-0:/var/lib/secrets/cache.secret" in made["service"]
    assert made["client"]["extra-substituters"] == ["http://cache.example.org:5000"]
    assert made["client"]["extra-trusted-public-keys"] == ["cache.example.org-1:…"]


def test_readme_has_at_most_900_words() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 900


def test_pictures_exist_and_are_small() -> None:
    pictures = re.findall(r"!\[[^\]]+\]\((\S+)\)", (ROOT / "README.md").read_text())
    assert pictures == ["docs/pictures/landing.png", "docs/pictures/speed.svg"]
    assert all(len((ROOT / picture).read_bytes()) < 100_000 for picture in pictures)

"""The trusted public keys are read from the same files as by Nix."""

import os
import subprocess
from pathlib import Path

import pytest

from harmonia.nix.nix_conf import trusted_keys
from harmonia.nix.signing import SecretKey
from support.programs import needs

ONE, TWO, THREE = (str(SecretKey.generate(name).public_key) for name in ("one", "two", "three"))


def names(tmp_path: Path, **environment: str) -> list[str]:
    return [key.name for key in trusted_keys({"NIX_CONF_DIR": str(tmp_path), "HOME": str(tmp_path), **environment})]


def test_default_is_the_key_of_cache_nixos_org(tmp_path: Path) -> None:
    assert names(tmp_path) == ["cache.nixos.org-1"]


def test_all_files_and_last_the_environment_are_read(tmp_path: Path) -> None:
    (tmp_path / ".config/nix").mkdir(parents=True)
    (tmp_path / ".config/nix/nix.conf").write_text(f"extra-trusted-public-keys = {TWO}\n")
    (tmp_path / "nix.conf").write_text(f"# a comment\ntrusted-public-keys = {ONE} broken # and more\n\ncores = 4\n")
    assert names(tmp_path) == ["one", "two"]
    assert names(tmp_path, NIX_CONFIG=f"extra-trusted-public-keys = {THREE} {ONE}") == ["one", "two", "three"]
    assert names(tmp_path, NIX_CONFIG=f"trusted-public-keys = {THREE}") == ["three"]


def test_included_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "nix.conf").write_text("include more.conf\n!include none.conf\n")
    (tmp_path / "more.conf").write_text(f"extra-trusted-public-keys = {ONE}\ninclude nix.conf\n")
    assert names(tmp_path) == ["cache.nixos.org-1", "one"]


@pytest.mark.nix
@needs("nix")
def test_nix_trusts_the_same_keys(tmp_path: Path) -> None:
    (tmp_path / ".config/nix").mkdir(parents=True)
    (tmp_path / ".config/nix/nix.conf").write_text("include more.conf\n")
    (tmp_path / ".config/nix/more.conf").write_text(f"extra-trusted-public-keys = {TWO}\n")
    (tmp_path / "nix.conf").write_text(f"trusted-public-keys = {ONE} # one\n")
    environment = {"NIX_CONF_DIR": str(tmp_path), "HOME": str(tmp_path)}
    command = ["nix", "--extra-experimental-features", "nix-command", "show-config"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=True)
    [line] = [line for line in done.stdout.splitlines() if line.startswith("trusted-public-keys = ")]
    assert line.split()[2:] == [str(key) for key in trusted_keys(environment)]

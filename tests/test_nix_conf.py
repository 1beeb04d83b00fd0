"""The settings of Nix are read from the same files as by Nix, and count as far as its daemon obeys them."""

import grp
import os
import pwd
import subprocess
from pathlib import Path

import pytest

from harmonia.nix.nix_conf import NixConf, asks_daemon, trusted_keys
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


USER, GROUP = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(os.getegid()).gr_name


@pytest.mark.parametrize(
    ("trusted_users", "obeyed"),
    [("alice", False), ("", False), ("@nobody-has-this-group", False), (USER, True), (f"@{GROUP}", True), ("*", True)],
)
def test_daemon_obeys_only_trusted_users(tmp_path: Path, trusted_users: str, *, obeyed: bool) -> None:
    system = "substituters = http://one\ntrusted-substituters = http://two/\n"
    (tmp_path / "nix.conf").write_text(f"{system}trusted-public-keys = {ONE}\ntrusted-users = {trusted_users}\n")
    own = f"extra-substituters = http://two http://three\nextra-trusted-public-keys = {TWO}\nsubstitute = false"
    environ = {"NIX_CONF_DIR": str(tmp_path), "NIX_CONFIG": own, "NIX_REMOTE": "daemon"}
    conf = NixConf(environ, by_daemon=True)
    assert [key.name for key in conf.trusted_keys()] == (["one", "two"] if obeyed else ["one"])
    assert conf.words("substituters") == ["http://one", "http://two", *["http://three"] * obeyed]
    assert conf.ignored_substituters == ([] if obeyed else ["http://three"])
    assert conf.words("substitute") == ["false"]
    for direct in (NixConf(environ), NixConf(environ | {"NIX_REMOTE": "local"}, by_daemon=True)):
        assert [key.name for key in direct.trusted_keys()] == ["one", "two"]
        assert direct.ignored_substituters == []


def test_daemon_is_asked_if_the_store_cannot_be_written(tmp_path: Path) -> None:
    assert not asks_daemon({"NIX_STATE_DIR": str(tmp_path)})  # this user can write there
    assert not asks_daemon({"NIX_STATE_DIR": str(tmp_path / "none")})  # and without a daemon, there is none to ask
    (tmp_path / "socket").touch()
    unwritable = {"NIX_STATE_DIR": str(tmp_path / "none"), "NIX_DAEMON_SOCKET_PATH": str(tmp_path / "socket")}
    assert asks_daemon(unwritable)
    assert not asks_daemon(unwritable | {"NIX_REMOTE": "local"})
    assert asks_daemon({"NIX_REMOTE": "unix:///run/nix"})


@pytest.mark.parametrize(
    ("value", "is_on"), [("true", True), ("yes", True), ("1", True), ("false", False), ("no", False), ("0", False)]
)
def test_true_and_false_have_all_forms_of_nix(tmp_path: Path, value: str, *, is_on: bool) -> None:
    (tmp_path / "nix.conf").write_text(f"substitute = {value}\n")
    conf = NixConf({"NIX_CONF_DIR": str(tmp_path)})
    for default in (True, False):
        assert conf.is_on("substitute", default=default) is is_on
        assert conf.is_on("require-sigs", default=default) is default


def test_netrc_file_is_that_of_nix(tmp_path: Path) -> None:
    environ = {"NIX_CONF_DIR": str(tmp_path)}
    assert NixConf(environ).netrc_file == f"{tmp_path}/netrc"
    (tmp_path / "nix.conf").write_text("netrc-file = /run/netrc\n")
    assert NixConf(environ).netrc_file == "/run/netrc"


@pytest.mark.nix
@needs("nix")
@pytest.mark.parametrize(
    ("variables", "trusted"),
    [
        ({}, ["one", "two"]),
        ({"XDG_CONFIG_DIRS": "{}/xdg"}, ["three", "two"]),
        ({"NIX_USER_CONF_FILES": "{}/xdg/nix/nix.conf:{}/.config/nix/nix.conf"}, ["three"]),
        ({"NIX_USER_CONF_FILES": "{}/.config/nix/nix.conf:{}/xdg/nix/nix.conf"}, ["three", "two"]),
    ],
)
def test_nix_trusts_the_same_keys(tmp_path: Path, variables: dict[str, str], trusted: list[str]) -> None:
    (tmp_path / ".config/nix").mkdir(parents=True)
    (tmp_path / "xdg/nix").mkdir(parents=True)
    (tmp_path / "xdg/nix/nix.conf").write_text(f"trusted-public-keys = {THREE}\n")
    (tmp_path / ".config/nix/nix.conf").write_text("include more.conf\n")
    (tmp_path / ".config/nix/more.conf").write_text(f"extra-trusted-public-keys = {TWO}\n")
    (tmp_path / "nix.conf").write_text(f"trusted-public-keys = {ONE} # one\n")
    environment = {"NIX_CONF_DIR": str(tmp_path), "HOME": str(tmp_path)}
    environment |= {name: value.format(tmp_path, tmp_path) for name, value in variables.items()}
    command = ["nix", "--extra-experimental-features", "nix-command", "show-config"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=True)
    [line] = [line for line in done.stdout.splitlines() if line.startswith("trusted-public-keys = ")]
    assert line.split()[2:] == [str(key) for key in trusted_keys(environment)]
    assert [key.name for key in trusted_keys(environment)] == trusted

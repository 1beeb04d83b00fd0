"""The command line: what it prints, and with which status it ends."""

import re
import tomllib
from pathlib import Path

import pytest

from harmonia import __version__
from harmonia.store_builder import StoreBuilder
from running import run


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A file with settings that work."""
    store = StoreBuilder(tmp_path)
    file = tmp_path / "harmonia.toml"
    file.write_text(f"bind = '127.0.0.1:0'\nreal_nix_store = '{store.real_dir}'\nnix_db_path = '{store.db_path}'\n")
    return file


def test_version() -> None:
    assert run("--version").stdout == f"harmonia {__version__}\n"


def test_help_names_every_command() -> None:
    text = run("--help").stdout
    for command in ("serve", "check-config", "demo", "--config"):
        assert command in text


def test_check_config_of_what_works(config: Path) -> None:
    answer = run("--config", str(config), "check-config")
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout


@pytest.mark.parametrize("command", [["check-config"], ["serve"], []])
@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("workers = 0", r"harmonia\.toml:4: workers: "),
        ("worker = 2", r"harmonia\.toml:4: worker: unknown key; did you mean workers\?"),
        ("tls_cert_path = 'cert.pem'", r"harmonia\.toml:4: tls_cert_path: .*tls_key_path"),
        ("sign_key_paths = ['missing']", r"harmonia\.toml:4: sign_key_paths: cannot read 'missing'"),
        ("[zstd]\nlevel = 99", r"harmonia\.toml:5: zstd\.level: "),
        ("= 1", r"harmonia\.toml:4: not valid TOML"),
    ],
)
def test_a_wrong_setting_is_one_line_and_status_2(config: Path, command: list[str], setting: str, said: str) -> None:
    with config.open("a") as file:
        file.write(setting + "\n")
    answer = run("--config", str(config), *command)
    assert answer.returncode == 2
    assert re.fullmatch(f"harmonia: .*{said}.*\n", answer.stderr)
    assert answer.stdout == ""


def test_settings_for_another_machine_are_checked_without_its_files(tmp_path: Path) -> None:
    file = tmp_path / "harmonia.toml"
    file.write_text("real_nix_store = '/elsewhere/nix/store'\nsign_key_paths = ['/elsewhere/key']\n")
    assert run("--config", str(file), "check-config").returncode == 2
    assert run("--config", str(file), "check-config", "--text-only").returncode == 0
    file.write_text("worker = 2\n")
    answer = run("--config", str(file), "check-config", "--text-only")
    assert answer.returncode == 2
    assert "did you mean workers?" in answer.stderr


def test_the_file_is_taken_from_the_environment(config: Path) -> None:
    assert run("check-config", environment={"CONFIG_FILE": str(config)}).returncode == 0
    answer = run("check-config", environment={"CONFIG_FILE": "/none"})
    assert answer.returncode == 2
    assert "CONFIG_FILE" in answer.stderr


def test_no_configuration_at_all_means_the_store_of_this_machine() -> None:
    """With none here it says so; with one it works, which tests/e2e shows where there is Nix."""
    answer = run("check-config")
    if Path("/nix/var/nix/db/db.sqlite").exists():
        assert answer.returncode == 0
    else:
        assert answer.returncode == 2
        assert "/nix/store" in answer.stderr


def test_a_warning_is_one_line(config: Path) -> None:
    with config.open("a") as file:
        file.write("max_connection_rate = 10\n")
    answer = run("--config", str(config), "check-config")
    assert answer.returncode == 0
    assert re.fullmatch(r".* WARNING .*max_connection_rate.*\n", answer.stderr)


def test_demo_says_what_to_do(tmp_path: Path) -> None:
    answer = run("demo", str(tmp_path / "demo"))
    assert answer.returncode == 0
    match = re.search(r"harmonia --config (\S+)", answer.stdout)
    assert match
    assert tomllib.loads(Path(match[1]).read_text())["real_nix_store"] == str(tmp_path / "demo/nix/store")
    assert run("--config", match[1], "check-config").returncode == 0
    for line in ("curl http://localhost:5000/nix-cache-info", "copy --from http://localhost:5000", "in a browser"):
        assert line in answer.stdout


def test_demo_leaves_other_directories_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    answer = run("demo", str(tmp_path))
    assert answer.returncode == 2
    assert answer.stderr.count("\n") == 1
    assert (tmp_path / "precious").read_text() == "mine"


def test_an_unknown_command_is_status_2() -> None:
    assert run("serv").returncode == 2

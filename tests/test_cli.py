"""The command line: output and exit status."""

import os
import pty
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from harmonia import __version__, cli
from harmonia.cli.man import commands
from harmonia.nix.signing import SecretKey
from harmonia.tools.store_builder import StoreBuilder
from support.preloaded import popen
from support.programs import needs, require
from support.running import HARMONIA, PATIENCE_S, open_files, patched, run, wait_until


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Create a file with valid settings."""
    store = StoreBuilder(tmp_path)
    store.add_text("text", b"text")
    file = tmp_path / "harmonia.toml"
    file.write_text(f"bind = '127.0.0.1:0'\nreal_nix_store = '{store.real_dir}'\nnix_db_path = '{store.db_path}'\n")
    return file


def test_version_option_prints_the_version() -> None:
    assert run("--version").stdout == f"harmonia {__version__}\n"


def test_help_names_every_command() -> None:
    text = run("--help").stdout
    for command in (
        "serve",
        "check-config",
        "keygen",
        "demo",
        "push",
        "watch",
        "doctor",
        "verify",
        "warm",
        "top",
        "ls",
        "cat",
        "nar",
    ):
        assert f"\n  {command} " in text
    for words in ("--config", "Exit status:", "NO_COLOR", "_HARMONIA_COMPLETE", "harmonia man"):
        assert words in text


@pytest.mark.parametrize("path", [context.command_path for context in commands(cli.main)])
def test_every_command_has_help(path: str) -> None:
    answer = CliRunner().invoke(cli.main, [*path.split()[1:], "--help"], prog_name="harmonia")
    assert (answer.exit_code, answer.stderr) == (0, "")
    assert answer.stdout.startswith(f"Usage: {path} ")


def test_check_config_accepts_valid_settings(config: Path) -> None:
    answer = run("--config", str(config), "check-config")
    assert (answer.returncode, answer.stderr) == (0, "")
    assert "# The configuration is valid." in answer.stdout


def test_check_config_prints_each_value_and_its_origin(config: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert run("keygen", name, str(tmp_path)).returncode == 0
    with config.open("a") as file:
        file.write(f"sign_key_paths = ['{tmp_path}/a.secret']\n[zstd]\nlevel = 5\n[publish]\nsigned_by = []\n")
    environment = {
        "CONFIG_FILE": str(config),
        "NIX_LOG_DIR": "/logs",
        "SIGN_KEY_PATHS": f"{tmp_path}/b.secret",
        "CACHE_DIRECTORY": "/cache",
    }
    text = run("check-config", environment=environment).stdout
    origins = {line.split(" = ")[0]: line.partition("  # ")[2] for line in text.splitlines() if " = " in line}
    assert origins["bind"] == f"{config}:1"
    assert origins["level"] == f"{config}:6"
    assert origins["signed_by"] == f"{config}:8"
    assert origins["allow"] == "default"
    assert origins["priority"] == "default"
    assert origins["log_dir"] == "environment variable NIX_LOG_DIR"
    assert origins["cache_dir"] == "environment variable CACHE_DIRECTORY"
    assert origins["sign_key_paths"] == f"{config}:4, environment variable SIGN_KEY_PATHS"
    assert "# cache_size is not set: half of the free space" in text
    assert "secret:" not in text


def test_check_config_reads_the_file_once(config: Path) -> None:
    command = [*HARMONIA, "--config", "/dev/stdin", "check-config"]
    done = subprocess.run(
        command, input=config.read_text(), capture_output=True, text=True, check=True, timeout=PATIENCE_S
    )
    assert re.search(r"(?m)^bind = \S+ +# /dev/stdin:1$", done.stdout)


def test_output_of_check_config_is_an_equivalent_configuration(config: Path, tmp_path: Path) -> None:
    with config.open("a") as file:
        file.write("trusted_proxies = ['unix', '10.0.0.0/8']\nbase_url = 'https://example.org'\n[zstd]\nlevel = -1\n")
    once = run("--config", str(config), "check-config").stdout
    again = tmp_path / "again.toml"
    again.write_text(once)
    twice = run("--config", str(again), "check-config").stdout
    values = tomllib.loads(once)
    assert values == tomllib.loads(twice)
    assert (values["trusted_proxies"], values["zstd"]["level"]) == (["unix", "10.0.0.0/8"], -1)
    assert values["real_nix_store"] == str(tmp_path / "nix/store")


@pytest.mark.parametrize("command", [["check-config"], ["serve"], []])
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("workers = 0", r"harmonia\.toml:4: workers: "),
        ("worker = 2", r"harmonia\.toml:4: worker: unknown key; did you mean workers\?"),
        ("tls_cert_path = 'cert.pem'", r"harmonia\.toml:4: tls_cert_path: .*tls_key_path"),
        ("sign_key_paths = ['missing']", r"harmonia\.toml:4: sign_key_paths: cannot read 'missing'"),
        ("[zstd]\nlevel = 99", r"harmonia\.toml:5: zstd\.level: "),
        ("= 1", r"harmonia\.toml:4: not valid TOML"),
    ],
)
def test_invalid_setting_is_one_line_and_status_2(config: Path, command: list[str], setting: str, message: str) -> None:
    with config.open("a") as file:
        file.write(setting + "\n")
    answer = run("--config", str(config), *command)
    assert answer.returncode == 2
    assert re.fullmatch(f"harmonia: .*{message}.*\n", answer.stderr)
    assert answer.stdout == ""


def test_text_only_checks_settings_without_files(tmp_path: Path) -> None:
    file = tmp_path / "harmonia.toml"
    file.write_text("real_nix_store = '/elsewhere/nix/store'\nsign_key_paths = ['/elsewhere/key']\n")
    assert run("--config", str(file), "check-config").returncode == 2
    assert run("--config", str(file), "check-config", "--text-only").returncode == 0
    file.write_text("worker = 2\n")
    answer = run("--config", str(file), "check-config", "--text-only")
    assert answer.returncode == 2
    assert "did you mean workers?" in answer.stderr


def test_config_file_variable_names_the_file(config: Path) -> None:
    assert run("check-config", environment={"CONFIG_FILE": str(config)}).returncode == 0
    answer = run("check-config", environment={"CONFIG_FILE": "/none"})
    assert answer.returncode == 2
    assert "CONFIG_FILE" in answer.stderr


@pytest.mark.parametrize(
    "arguments", [["--bind", "ADDRESS"], ["serve", "--bind", "ADDRESS"], ["--bind", "ADDRESS", "serve"]]
)
def test_bind_option_overrides_the_setting(config: Path, arguments: list[str]) -> None:
    config.write_text(config.read_text().replace("bind = '127.0.0.1:0'", "bind = 'unix:/nonexistent/socket'"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        answer = run("--config", str(config), *(word.replace("ADDRESS", address) for word in arguments))
    assert answer.returncode == 2
    remedy = "choose another address, as by harmonia serve --bind :8080, or stop the program that uses it"
    assert answer.stderr == f"harmonia: --bind: {address} is already in use; {remedy}\n"


@pytest.mark.parametrize("before", [[], ["--config", "/none"]])
@pytest.mark.parametrize("command", [["serve"], ["check-config"], ["ls", "path"]])
def test_config_option_may_follow_the_command(tmp_path: Path, before: list[str], command: list[str]) -> None:
    file = tmp_path / "harmonia.toml"
    file.write_text("workers = 0\n")
    answer = run(*before, *command, "--config", str(file))
    assert answer.returncode == 2
    assert answer.stderr.startswith(f"harmonia: {file}:1: workers: ")


def test_default_is_the_store_of_this_machine() -> None:
    """Without a store, this is an error. tests/e2e/test_defaults.py tests a machine with a store."""
    answer = run("check-config")
    if Path("/nix/var/nix/db/db.sqlite").exists():
        assert answer.returncode == 0
    else:
        assert answer.returncode == 2
        assert "/nix/store" in answer.stderr


def test_warning_is_one_line(config: Path) -> None:
    with config.open("a") as file:
        file.write("max_connection_rate = 10\n")
    answer = run("--config", str(config), "check-config")
    assert answer.returncode == 0
    assert re.fullmatch(r".* WARNING .*max_connection_rate.*\n", answer.stderr)


def test_demo_prints_the_next_commands(tmp_path: Path) -> None:
    answer = run("demo", str(tmp_path / "demo"))
    assert answer.returncode == 0
    match = re.search(r"harmonia --config (\S+)", answer.stdout)
    assert match
    assert tomllib.loads(Path(match[1]).read_text())["real_nix_store"] == str(tmp_path / "demo/nix/store")
    assert run("--config", match[1], "check-config").returncode == 0
    for line in (
        "curl http://localhost:5000/nix-cache-info",
        "copy --refresh --from http://localhost:5000",
        "in a browser",
    ):
        assert line in answer.stdout


@pytest.mark.parametrize(
    ("arguments", "url"),
    [
        (["demo", "--bind", ":8080"], "http://localhost:8080"),
        (["--bind", "127.0.0.2:8080", "demo"], "http://127.0.0.2:8080"),
        (["demo", "--bind", "[::1]:8080"], "http://[::1]:8080"),
    ],
)
def test_demo_names_the_address_that_it_was_given(tmp_path: Path, arguments: list[str], url: str) -> None:
    told = run(*arguments, str(tmp_path / "demo")).stdout
    bind = shlex.quote(next(each for each in arguments if "80" in each))
    assert f"{tmp_path}/demo/harmonia.toml serve --bind {bind}\n" in told
    assert set(re.findall(r"http://[^/ ]+", told)) == {url}


def test_demo_rejects_a_unix_socket_before_it_makes_anything(tmp_path: Path) -> None:
    answer = run("demo", "--bind", "unix:/run/demo", str(tmp_path / "demo"))
    assert (answer.returncode, answer.stderr) == (
        2,
        "harmonia: --bind: the demo needs a TCP address, like :8080; see harmonia demo --help\n",
    )
    assert not (tmp_path / "demo").exists()


def test_demo_does_not_change_other_directories(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    answer = run("demo", str(tmp_path))
    assert answer.returncode == 2
    assert answer.stderr.count("\n") == 1
    assert (tmp_path / "precious").read_text() == "mine"


class TestKeygen:
    def test_keys_match_and_the_next_steps_are_printed(self, tmp_path: Path) -> None:
        answer = run("keygen", "cache.example.org-1", str(tmp_path))
        assert answer.returncode == 0
        secret = (tmp_path / "cache.example.org-1.secret").read_text()
        public = (tmp_path / "cache.example.org-1.public").read_text()
        assert str(SecretKey.parse(secret).public_key) == public
        assert f'sign_key_paths = ["{tmp_path}/cache.example.org-1.secret"]' in answer.stdout
        assert f"extra-trusted-public-keys = {public}" in answer.stdout
        assert secret not in answer.stdout

    def test_secret_key_is_readable_only_by_its_owner(self, tmp_path: Path) -> None:
        run("keygen", "a", str(tmp_path))
        assert (tmp_path / "a.secret").stat().st_mode & 0o777 == 0o600

    @pytest.mark.parametrize("kind", ["secret", "public"])
    def test_existing_file_is_not_overwritten(self, tmp_path: Path, kind: str) -> None:
        (tmp_path / f"a.{kind}").write_text("mine")
        answer = run("keygen", "a", str(tmp_path))
        assert (answer.returncode, answer.stdout) == (2, "")
        assert re.fullmatch(rf"harmonia: .*a\.{kind} already exists; .*\n", answer.stderr)
        assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]

    @pytest.mark.parametrize("name", ["", "a b", "a:b", "../a", "a/b", ".a", "-a", "ä"])
    def test_invalid_key_name_is_rejected(self, tmp_path: Path, name: str) -> None:
        assert run("keygen", "--", name, str(tmp_path)).returncode == 2
        assert not list(tmp_path.iterdir())

    @pytest.mark.nix
    @needs("nix")
    def test_keys_have_the_format_of_nix(self, tmp_path: Path) -> None:
        run("keygen", "cache.example.org-1", str(tmp_path))
        secret, public = (tmp_path / f"cache.example.org-1.{kind}" for kind in ("secret", "public"))
        command = ["nix", "--extra-experimental-features", "nix-command", "key", "convert-secret-to-public"]
        environment = {**os.environ, "HOME": str(tmp_path)}
        converted = subprocess.run(command, input=secret.read_bytes(), capture_output=True, env=environment, check=True)
        assert converted.stdout.decode().strip() == public.read_text()
        theirs = [tmp_path / "theirs", tmp_path / "theirs.public"]
        subprocess.run(
            ["nix-store", "--generate-binary-cache-key", "cache.example.org-1", *theirs], env=environment, check=True
        )
        for their, our in zip(theirs, (secret, public), strict=True):
            pattern = r"cache\.example\.org-1:[A-Za-z0-9+/]+=*"
            assert re.fullmatch(pattern, their.read_text())
            assert re.fullmatch(pattern, our.read_text())
            assert len(their.read_text()) == len(our.read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serv"], r"No such command 'serv'\. Did you mean 'serve'\? See harmonia --help"),
        (["sevre"], r"No such command 'sevre'\. Did you mean 'serve'\? See harmonia --help"),
        (["frobnicate"], "No such command 'frobnicate'; see harmonia --help"),
        (["--config", "", "check-config"], "Invalid value for '--config': the file name is empty; give one, .*"),
        (["ls", "--config", "", "x"], "Invalid value for '--config': the file name is empty; give one, .*"),
        (["--confg", "x"], r"No such option '--confg'; did you mean --config\? See harmonia --help"),
        (["--xyz"], "No such option '--xyz'; see harmonia --help"),
        (["--port", "8080"], "No such option '--port'; use --bind ADDRESS, for example --bind :8080"),
        (["-p8080"], "No such option '-p'; use --bind ADDRESS, for example --bind :8080"),
        (["serve", "--host=::"], "No such option '--host'; use --bind ADDRESS, for example --bind :8080"),
        (["top", "--port", "80"], "No such option '--port'; see harmonia top --help"),
        (["serve", "--priority=50"], "No such option '--priority'; priority is a setting: put it into .*"),
        (["--cache-size", "5G"], "No such option '--cache-size'; cache_size is a setting: put it into .*"),
        (["--bind", ":80", "top"], "--bind applies to serve and demo, not to top; omit it; see harmonia --help"),
        (["--bind", "x:y"], "--bind: expected \"host:port\", .*, found 'x:y'"),
        (["ls"], "Missing argument 'PATH'; see harmonia ls --help"),
        (["verify"], "give PATHs or --all, not both; see harmonia verify --help"),
        (["nar", "dump", "/none"], "'/none' does not exist; name a file, .* symlink; see harmonia nar dump --help"),
        (["nar", "ls", "/none"], ".*'/none': No such file or directory; see harmonia nar ls --help"),
        (["verify", "--all", "--max-age", "soon"], ".*duration like .*, found 'soon'; see harmonia verify --help"),
        (["top", "--interval", "fast"], ".*duration like .*, found 'fast'; see harmonia top --help"),
        (["top", "--interval", "2h"], r".* 7200(\.0)? is not in the range 0\.1<=x<=3600; see harmonia top --help"),
        (["doctor", "--largest", "lots"], ".* size like .*, found 'lots'; see harmonia doctor --help"),
        (["doctor", "--largest", "1G"], r".* 1024 is not in the range 1<=x<=256; see harmonia doctor --help"),
        (["warm"], "give PATHs or --gc-roots; see harmonia warm --help"),
    ],
)
def test_usage_error_is_one_line_with_help_and_status_2(arguments: list[str], message: str) -> None:
    answer = run(*arguments)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert re.fullmatch(f"harmonia: {message}\n", answer.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["ls", "/nix/store/none"],
            "'/nix/store/none' does not name a valid path of the store /nix/store; give its path, .*",
        ),
        (["cat", "x"], "'x' does not name a valid path .*"),
        (["top", "http://127.0.0.1:1"], "http://127.0.0.1:1: Connection refused; check that the server runs .*"),
        (["top"], "bind has no fixed port; give the URL of the server"),
    ],
)
def test_failure_is_one_line_and_status_1(config: Path, arguments: list[str], message: str) -> None:
    answer = run("--config", str(config), *arguments)
    assert (answer.returncode, answer.stdout) == (1, "")
    assert re.fullmatch(f"harmonia: {message}\n", answer.stderr)


def interrupted(*command: str, begun: Callable[[int], object]) -> subprocess.CompletedProcess[str]:
    """Run a command, interrupt it once it has begun, and return the result."""
    with (
        open(os.devnull, "wb") as nothing,
        popen(command, env=os.environ, stdout=nothing, stderr=subprocess.PIPE, text=True) as process,
    ):
        try:
            wait_until(lambda: begun(process.pid))
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
    return subprocess.CompletedProcess(command, process.returncode, "", stderr)


def test_ctrl_c_ends_a_dump_with_one_line(tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(1 << 40)
    done = interrupted(*HARMONIA, "nar", "dump", str(large), begun=lambda pid: str(large) in open_files(pid))
    assert (done.returncode, done.stderr) == (130, "harmonia: interrupted\n")


def test_ctrl_c_ends_warm_while_threads_compress(config: Path, tmp_path: Path) -> None:
    with config.open("a") as file:
        file.write(f"cache_dir = '{tmp_path}/cache'\n")
    info = StoreBuilder(tmp_path / "another").add_text("text", b"")
    config.write_text(config.read_text().replace(f"{tmp_path}/nix", f"{tmp_path}/another/nix"))
    endless = patched("import harmonia.cache.warmer\nharmonia.cache.warmer._state = lambda _: None")
    command = [*endless, "--config", str(config), "warm", info.path]
    done = interrupted(*command, begun=lambda _: any((tmp_path / "cache").glob("nar/*")))
    assert done.returncode == 130
    assert done.stderr.splitlines()[1].startswith("harmonia: interrupted; finished NARs stay in the cache, ")


@pytest.mark.parametrize("arguments", [["man"], ["check-config"], ["nar", "dump", __file__]])
def test_full_disk_is_one_line_and_status_1(config: Path, arguments: list[str]) -> None:
    command = [*HARMONIA, "--config", str(config), *arguments]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=PATIENCE_S)
    assert (done.returncode, done.stderr) == (1, "harmonia: cannot write: No space left on device\n")


def test_other_commands_do_not_import_the_web_server() -> None:
    modules = ", ".join(f"harmonia.cli.{name}" for name in ("demo", "doctor", "ls", "nar", "top", "verify", "warm"))
    program = f"import sys, {modules}; print('sanic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_missing_store_is_reported_with_a_remedy(tmp_path: Path) -> None:
    file = tmp_path / "harmonia.toml"
    file.write_text(f"real_nix_store = '{tmp_path}/none'\n")
    answer = run("--config", str(file), "ls", f"/nix/store/{'0' * 32}-name")
    assert answer.returncode == 1
    assert re.fullmatch(r"harmonia: cannot read \S+: .*; use --config if the store is elsewhere\n", answer.stderr)


@pytest.fixture
def program(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which `harmonia` is a program, and $HOME has only `archive.nar`."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/harmonia").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m harmonia "$@"\n')
    (tmp_path / "bin/harmonia").chmod(0o755)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/archive.nar").touch()
    return {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "HOME": f"{tmp_path}/home", "TERM": "dumb"}


def start_up(shell: str) -> str:
    """Return the line from the help for the start-up file of that shell."""
    found = re.search(rf"(?m)^ +{shell} +(.*_HARMONIA_COMPLETE.*)$", run("--help").stdout)
    assert found
    return found[1]


COMPLETED = [
    ("harmonia verif", "verify"),
    ("harmonia warm --gc", "--gc-roots"),
    ("harmonia nar rest", "restore"),
    ("harmonia token --scope met", "metrics"),
    ("harmonia nar ls arch", "archive.nar"),
    ("harmonia --config arch", "archive.nar"),
    ("harmonia cat arch", "archive.nar"),
]


@pytest.mark.parametrize(
    ("shell", "prepare"),
    [
        pytest.param("bash --norc --noprofile -i", "", id="bash"),
        pytest.param("zsh -f -i", "autoload -Uz compinit && compinit -u -D; ", id="zsh"),
    ],
)
def test_shell_completes_typed_words(shell: str, prepare: str, program: dict[str, str]) -> None:
    name, *options = shell.split()
    require(name)
    keyboard, terminal = pty.openpty()
    with subprocess.Popen(
        [name, *options], stdin=terminal, stdout=terminal, stderr=terminal, env=program, cwd=program["HOME"],
        start_new_session=True,
    ) as process:  # fmt: skip
        os.close(terminal)
        try:
            os.write(keyboard, f"{prepare}{start_up(name)}; echo rea''dy\n".encode())
            read_until(keyboard, "ready")
            for typed, completed in COMPLETED:
                os.write(keyboard, f"{typed}\t".encode())
                read_until(keyboard, typed.rpartition(" ")[0] + " " + completed)
                os.write(keyboard, b"\x15")  # Ctrl-U: clear the line
        finally:
            process.kill()
    os.close(keyboard)


def read_until(terminal: int, text: str) -> None:
    shown = ""
    deadline = time.monotonic() + PATIENCE_S
    while text not in shown:
        assert select.select([terminal], [], [], deadline - time.monotonic())[0], f"no {text!r} in {shown!r}"
        shown += os.read(terminal, 4096).decode()


@needs("fish")
def test_fish_completes_and_shows_whole_descriptions(program: dict[str, str]) -> None:
    script = "\n".join([start_up("fish"), *(f"complete -C '{typed}'" for typed, _ in COMPLETED)])
    command = ["fish", "--no-config", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=program, cwd=program["HOME"], check=True)
    lines = done.stdout.splitlines()
    assert [line.partition("\t")[0] for line in lines] == [completed for _, completed in COMPLETED]
    assert lines[1] == "--gc-roots\tInclude all GC roots: profiles, systems, results."


@needs("groff")
def test_manual_page_is_complete_and_groff_reports_nothing(tmp_path: Path) -> None:
    page = tmp_path / "harmonia.1"
    page.write_text(run("man").stdout)
    command = ["groff", "-man", "-ww", "-Tutf8", "-P-c", str(page)]
    done = subprocess.run(command, capture_output=True, check=True, env={**os.environ, "MANWIDTH": "100"})
    assert done.stderr == b""
    text = re.sub(r".\x08", "", done.stdout.decode())
    for words in (
        "NAME",
        "COMMANDS",
        "/nix/store/…",
        "harmonia nar restore",
        "--max-age",
        "EXIT STATUS",
        'eval "$(_HARMONIA_COMPLETE',
    ):
        assert words in text
    assert "\\" not in text


@needs("mandoc")
def test_mandoc_reports_only_the_missing_date_of_the_manual_page(tmp_path: Path) -> None:
    (tmp_path / "harmonia.1").write_text(run("man").stdout)
    command = ["mandoc", "-T", "lint", "-W", "warning", str(tmp_path / "harmonia.1")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert [line for line in done.stdout.splitlines() if "missing date" not in line] == []

"""`check-config` gives the same errors and warnings as a start of the server, without side effects."""

import re
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from harmonia.tools.store_builder import StoreBuilder
from support.ports import ReservedPort
from support.programs import needs
from support.running import Server, run

Start = Callable[..., Server]


@pytest.fixture
def store(tmp_path: Path) -> StoreBuilder:
    (tmp_path / "file").write_text("no database")
    (tmp_path / "empty").touch()
    with closing(sqlite3.connect(tmp_path / "other")) as other, other:
        other.execute("create table recipes (name)")
    builder = StoreBuilder(tmp_path / "store")
    builder.add_text("text", b"text")
    return builder


def reported_error(directory: Path, settings: str) -> str:
    """Return the error of both, without the name of the file. Lines of `settings` begin with the fourth."""
    server = Server(directory / "server", directory / "store", settings, bind="127.0.0.1:0")
    lines = server.config.read_text().splitlines()
    changed_keys = {line.split(" = ")[0] for line in settings.splitlines()}
    other_lines = "\n".join(line for line in lines[:5] if line.split(" = ")[0] not in changed_keys)
    server.config.write_text(f"{other_lines}\n{settings}\n")
    server.launch()
    assert server.wait() == 2
    (line,) = server.log
    checked = run("--config", str(server.config), "check-config")
    assert (checked.returncode, checked.stdout, checked.stderr) == (2, "", line)
    return re.sub(rf"\Aharmonia: {re.escape(str(server.config))}:[56]: ", "", line).replace(str(directory), "ROOT")


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("bind = 'no-such-host.invalid:5000'", "bind: no-such-host.invalid:5000 cannot be resolved: "),
        ("bind = 'a..b:5000'", "bind: a..b:5000 cannot be resolved: not a host name; choose another"),
        ("bind = '192.0.2.1:5000'", "bind: 192.0.2.1:5000 cannot be used: Cannot assign requested address; "),
        (
            "bind = 'unix:ROOT/none/socket'",
            "bind: unix:ROOT/none/socket is in a missing directory; create 'ROOT/none', in ",
        ),
        ("bind = 'unix:ROOT/file/socket'", "bind: unix:ROOT/file/socket cannot be used: Not a directory; "),
        ("bind = 'unix:ROOT/file'", "bind: unix:ROOT/file exists and is not a socket; choose another path, "),
        ("metrics_bind = 'unix:ROOT/none/socket'", "metrics_bind: unix:ROOT/none/socket is in a missing directory; "),
        (
            "nix_db_path = 'ROOT/file'",
            "nix_db_path: 'ROOT/file' is not a database of Nix: file is not a database; name ",
        ),
        (
            "nix_db_path = 'ROOT/empty'",
            "nix_db_path: 'ROOT/empty' is not a database of Nix: no such table: ValidPaths; ",
        ),
        (
            "nix_db_path = 'ROOT/other'",
            "nix_db_path: 'ROOT/other' is not a database of Nix: no such table: ValidPaths; ",
        ),
        ("nix_db_path = 'ROOT'", "nix_db_path: cannot read 'ROOT': Is a directory; set nix_db_path to "),
        ("cache_dir = 'ROOT/file'", "cache_dir: 'ROOT/file' is not a directory; name a directory"),
        ("cache_dir = 'ROOT/file/below/it'", "cache_dir: 'ROOT/file' is not a directory; name a directory"),
    ],
)
@pytest.mark.usefixtures("store")
def test_server_and_check_config_report_the_same_error(tmp_path: Path, setting: str, expected: str) -> None:
    assert reported_error(tmp_path, setting.replace("ROOT", str(tmp_path))).startswith(expected)


@pytest.mark.parametrize(
    ("bind", "metrics_bind", "refused"),
    [
        ("127.0.0.1:{port}", "127.0.0.1:{port}", True),
        ("[::]:{port}", "127.0.0.1:{port}", True),
        ("[::1]:{port}", "[::]:{port}", True),
        ("0.0.0.0:{port}", "localhost:{port}", True),
        ("0.0.0.0:{port}", "[::1]:{port}", False),
        ("127.0.0.1:{port}", "127.0.0.2:{port}", False),
        ("127.0.0.1:0", "127.0.0.1:0", False),
        ("unix:{directory}/socket", "unix:{directory}/socket", True),
        ("unix:{directory}/socket", "unix:{directory}/another", False),
    ],
)
@pytest.mark.usefixtures("store")
def test_overlapping_addresses_are_rejected(
    start: Start, tmp_path: Path, bind: str, metrics_bind: str, *, refused: bool
) -> None:
    with ReservedPort(host="") as port:
        bind, metrics_bind = (each.format(port=port.number, directory=tmp_path) for each in (bind, metrics_bind))
        if refused:
            line = reported_error(tmp_path, f"bind = '{bind}'\nmetrics_bind = '{metrics_bind}'")
            expected = f"metrics_bind: {metrics_bind} overlaps with bind = '{bind}'; choose another address\n"
            assert line == expected.replace(str(tmp_path), "ROOT")
        else:
            start(store=tmp_path / "store", bind=bind, settings=f"metrics_bind = '{metrics_bind}'")


def certificate(directory: Path, *, days: int) -> str:
    """Create a certificate that expires in `days` days, and return its settings."""
    for command in (
        "req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=cache -keyout key.pem -out request.pem",
        f"x509 -req -in request.pem -key key.pem -days {days} -out cert.pem",
    ):
        subprocess.run(["openssl", *command.split()], cwd=directory, capture_output=True, check=True)
    (directory / "key.pem").chmod(0o600)
    return f"tls_cert_path = '{directory}/cert.pem'\ntls_key_path = '{directory}/key.pem'"


def warnings(start: Start, root: Path, settings: str) -> list[str]:
    """Return the warnings of both, without time, file and line."""
    server = start(store=root / "store", settings=settings)
    checked = run("--config", str(server.config), "check-config")
    assert checked.returncode == 0
    place = rf"(?m)WARNING {re.escape(str(server.config))}:(?:\d+: )?(.*\n)"
    both = [
        [warning.replace(str(root), "ROOT") for warning in re.findall(place, log)]
        for log in ("".join(server.log), checked.stderr)
    ]
    assert both[0] == both[1]
    return both[0]


@needs("openssl")
@pytest.mark.parametrize("days", [-1, 1])
@pytest.mark.usefixtures("store")
def test_expired_certificate_gives_a_warning(start: Start, tmp_path: Path, days: int) -> None:
    message = "tls_cert_path: clients will refuse 'ROOT/cert.pem': certificate has expired; replace it\n"
    assert warnings(start, tmp_path, certificate(tmp_path, days=days)) == ([message] if days < 0 else [])


@pytest.mark.usefixtures("store")
def test_missing_log_directory_gives_a_warning(start: Start, tmp_path: Path) -> None:
    message = "log_dir: 'ROOT/none' is not a directory; name the directory of Nix's logs\n"
    assert warnings(start, tmp_path, f"log_dir = '{tmp_path}/none'") == [message]


@pytest.mark.usefixtures("store")
def test_unusable_home_gives_a_warning_only(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CACHE_DIRECTORY", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/dev/null")
    server = start(store=tmp_path / "store")
    server.stop()
    server.config.write_text(re.sub("cache_dir = .*\n", "", server.config.read_text()))
    checked = run("--config", str(server.config), "check-config")
    assert checked.returncode == 0
    assert "cache_dir: '/dev/null' is not a directory; name a directory" in checked.stderr
    server.log.clear()
    server.start()
    assert server.get("/nix-cache-info").status == 200
    assert any("environment variable HOME: cache_dir: '/dev/null' is not a directory; " in line for line in server.log)


def test_store_with_another_directory_gives_a_warning(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    cause = f"no path of {store.db_path!r} is in '/gnu/store'; they are in '/nix/store'; set this to that directory"
    message = f"virtual_nix_store: {cause}\n".replace(str(tmp_path), "ROOT")
    assert warnings(start, tmp_path, "virtual_nix_store = '/gnu/store'") == [message]


def test_empty_store_gives_a_warning(start: Start, tmp_path: Path) -> None:
    StoreBuilder(tmp_path / "store")
    [message] = warnings(start, tmp_path, "")
    assert "nix_db_path: 'ROOT/store/nix/var/nix/db/db.sqlite' has no valid paths, so nothing is served" in message
    assert message.endswith("; to try Harmonia, use harmonia demo, or make demo in a clone\n")


def test_empty_store_is_no_mistake_if_upstreams_are_asked(start: Start, tmp_path: Path) -> None:
    StoreBuilder(tmp_path / "store")
    assert warnings(start, tmp_path, "[[upstream]]\nurl = 'http://127.0.0.1:1'") == []


@pytest.mark.usefixtures("store")
def test_check_config_creates_no_cache_directory(start: Start, tmp_path: Path) -> None:
    server = start(store=tmp_path / "store", cache_dir=tmp_path / "cache/directory")
    assert server.stop() == 0
    shutil.rmtree(tmp_path / "cache")
    assert run("--config", str(server.config), "check-config").returncode == 0
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_locked_database_gives_a_warning_only(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    with closing(sqlite3.connect(store.db_path, isolation_level=None)) as nix:
        nix.execute("pragma journal_mode = delete")
        nix.execute("begin exclusive")
        message = f"cannot read {store.db_path}: database is locked; the store is not served until it is readable\n"
        assert [line.partition("nix_db_path: ")[2] for line in warnings(start, tmp_path, "")] == [
            message.replace(str(tmp_path), "ROOT")
        ]


@pytest.mark.parametrize("bind", ["127.0.0.1:{port}", "unix:{directory}/socket"])
@pytest.mark.usefixtures("store")
def test_check_config_does_not_disturb_a_running_server(
    start: Start, tmp_path: Path, new_port: Callable[[], int], bind: str
) -> None:
    server = start(store=tmp_path / "store", bind=bind.format(port=new_port(), directory=tmp_path))
    for _ in range(3):
        checked = run("--config", str(server.config), "check-config")
        assert (checked.returncode, checked.stderr) == (0, "")
        assert server.get("/nix-cache-info").status == 200
    assert server.stop() == 0
    assert len(server.log) == 3, server.log  # start, overview and stop

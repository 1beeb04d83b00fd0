"""What a start refuses or warns of, `check-config` tells beforehand in the same words, and disturbs nobody by it."""

import re
import shutil
import socket
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from harmonia.tools.store_builder import StoreBuilder
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


def told(directory: Path, settings: str) -> str:
    """What both say who may not go on, after the name of the file. Lines of `settings` begin with the fourth."""
    server = Server(directory / "server", directory / "store", settings, bind="127.0.0.1:0")
    lines = server.config.read_text().splitlines()
    given = {line.split(" = ")[0] for line in settings.splitlines()}
    kept = "\n".join(line for line in lines[:5] if line.split(" = ")[0] not in given)
    server.config.write_text(f"{kept}\n{settings}\n")
    server.launch()
    assert server.wait() == 2
    (line,) = server.log
    checked = run("--config", str(server.config), "check-config")
    assert (checked.returncode, checked.stdout, checked.stderr) == (2, "", line)
    return re.sub(rf"\Aharmonia: {re.escape(str(server.config))}:[56]: ", "", line).replace(str(directory), "ROOT")


@pytest.mark.parametrize(
    ("setting", "what"),
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
def test_what_cannot_work_is_refused_by_both(tmp_path: Path, setting: str, what: str) -> None:
    assert told(tmp_path, setting.replace("ROOT", str(tmp_path))).startswith(what)


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
def test_two_settings_do_not_take_one_address(
    start: Start, tmp_path: Path, bind: str, metrics_bind: str, *, refused: bool
) -> None:
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    bind, metrics_bind = (each.format(port=port, directory=tmp_path) for each in (bind, metrics_bind))
    if refused:
        line = told(tmp_path, f"bind = '{bind}'\nmetrics_bind = '{metrics_bind}'")
        expected = f"metrics_bind: {metrics_bind} overlaps with bind = '{bind}'; choose another address\n"
        assert line == expected.replace(str(tmp_path), "ROOT")
    else:
        start(store=tmp_path / "store", bind=bind, settings=f"metrics_bind = '{metrics_bind}'")


def certificate(directory: Path, *, days: int) -> str:
    """One whose time ends so many days from now, as settings."""
    for command in (
        "req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=cache -keyout key.pem -out request.pem",
        f"x509 -req -in request.pem -key key.pem -days {days} -out cert.pem",
    ):
        subprocess.run(["openssl", *command.split()], cwd=directory, capture_output=True, check=True)
    (directory / "key.pem").chmod(0o600)
    return f"tls_cert_path = '{directory}/cert.pem'\ntls_key_path = '{directory}/key.pem'"


def warned(start: Start, root: Path, settings: str) -> list[str]:
    """The warnings of both, without time and file."""
    server = start(store=root / "store", settings=settings)
    checked = run("--config", str(server.config), "check-config")
    assert checked.returncode == 0
    mark = f"WARNING {server.config}:"
    both = [
        [line.partition(mark)[2].replace(str(root), "ROOT") for line in lines if mark in line]
        for lines in (server.log, checked.stderr.splitlines(keepends=True))
    ]
    assert both[0] == both[1]
    return both[0]


@needs("openssl")
@pytest.mark.parametrize("days", [-1, 1])
@pytest.mark.usefixtures("store")
def test_a_certificate_that_clients_will_refuse_is_warned_of(start: Start, tmp_path: Path, days: int) -> None:
    told = "6: tls_cert_path: clients will refuse 'ROOT/cert.pem': certificate has expired; replace it\n"
    assert warned(start, tmp_path, certificate(tmp_path, days=days)) == ([told] if days < 0 else [])


@pytest.mark.usefixtures("store")
def test_logs_that_are_not_there_are_warned_of(start: Start, tmp_path: Path) -> None:
    told = "6: log_dir: 'ROOT/none' is not a directory; name the directory of Nix's logs\n"
    assert warned(start, tmp_path, f"log_dir = '{tmp_path}/none'") == [told]


@pytest.mark.usefixtures("store")
def test_a_home_that_is_none_stops_nothing(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_store_of_another_name_is_warned_of(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    what = f"no path of {store.db_path!r} is in '/gnu/store'; they are in '/nix/store'; set this to that directory"
    told = f"6: virtual_nix_store: {what}\n".replace(str(tmp_path), "ROOT")
    assert warned(start, tmp_path, "virtual_nix_store = '/gnu/store'") == [told]


def test_an_empty_store_is_warned_of(start: Start, tmp_path: Path) -> None:
    StoreBuilder(tmp_path / "store")
    [told] = warned(start, tmp_path, "")
    assert "nix_db_path: 'ROOT/store/nix/var/nix/db/db.sqlite' has no valid paths, so nothing is served" in told
    assert told.endswith("; to try Harmonia, use harmonia demo, or make demo in a clone\n")


@pytest.mark.usefixtures("store")
def test_a_cache_directory_is_not_made_by_who_only_checks(start: Start, tmp_path: Path) -> None:
    server = start(store=tmp_path / "store", cache_dir=tmp_path / "cache/directory")
    assert server.stop() == 0
    shutil.rmtree(tmp_path / "cache")
    assert run("--config", str(server.config), "check-config").returncode == 0
    assert not (tmp_path / "cache").exists()


def test_a_database_that_is_locked_just_now_stops_nothing(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    with closing(sqlite3.connect(store.db_path, isolation_level=None)) as nix:
        nix.execute("pragma journal_mode = delete")
        nix.execute("begin exclusive")
        told = f"cannot read {store.db_path}: database is locked; nothing is served until it is readable\n"
        assert [line.partition("nix_db_path: ")[2] for line in warned(start, tmp_path, "")] == [
            told.replace(str(tmp_path), "ROOT")
        ]


@pytest.mark.parametrize("bind", ["127.0.0.1:{port}", "unix:{directory}/socket"])
@pytest.mark.usefixtures("store")
def test_a_server_that_runs_with_these_settings_is_left_alone(start: Start, tmp_path: Path, bind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = start(store=tmp_path / "store", bind=bind.format(port=port, directory=tmp_path))
    for _ in range(3):
        checked = run("--config", str(server.config), "check-config")
        assert (checked.returncode, checked.stderr) == (0, "")
        assert server.get("/nix-cache-info").status == 200
    assert server.stop() == 0
    assert len(server.log) == 2, server.log  # that it serves, and that it stops

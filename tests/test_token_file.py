"""The command `harmonia token` lists, checks and revokes tokens, and edits their file without a trace elsewhere."""

import json
import os
import subprocess
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest

from harmonia.config import token_file
from harmonia.config.tokens import new
from harmonia.errors import ConfigError
from support.running import run, run_binary

DAY_S = 86400
SECRETS = {name: new(name, scopes, end) for name, scopes, end in (
    ("builder", ["read"], float("inf")),
    ("ci", ["push", "sign:app-*"], 4102444800.0),
    ("old", ["read", "browse"], 1577836800.0),
)}  # fmt: skip
TEXT = "".join(
    f"{comment}{token}\n" for (_, token), comment in zip(SECRETS.values(), ("# builders\n", "\n", "\t"), strict=True)
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(TEXT)
    return path


def harmonia(file: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    done = run_binary("token", *arguments, "--file", str(file), stdin=stdin.encode())
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_list_shows_names_scopes_and_ends_but_no_hash(file: Path) -> None:
    shown = harmonia(file, "list").stdout
    assert shown.splitlines() == [
        "builder  read             does not expire",
        "ci       push,sign:app-*  expires 2100-01-01T00:00:00Z",
        "old      read,browse      expired 2020-01-01T00:00:00Z",
    ]
    rows = json.loads(harmonia(file, "list", "--json").stdout)
    assert rows[1] == {
        "name": "ci",
        "scopes": ["push", "sign:app-*"],
        "expires": "2100-01-01T00:00:00Z",
        "expired": False,
    }
    assert (rows[0]["expires"], rows[2]["expired"]) == (None, True)
    for secret, token in SECRETS.values():
        assert token.sha256.hex() not in shown + json.dumps(rows)
        assert secret not in shown


def test_list_reads_the_file_of_the_settings(file: Path, tmp_path: Path) -> None:
    (tmp_path / "harmonia.toml").write_text(f"tokens_path = '{file}'\n")
    listed = run("--config", str(tmp_path / "harmonia.toml"), "token", "list")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["builder", "ci", "old"]
    (tmp_path / "harmonia.toml").write_text("")
    without = run("--config", str(tmp_path / "harmonia.toml"), "token", "list")
    assert (without.returncode, without.stderr) == (
        2,
        "harmonia: tokens_path is not set; set it, or give --file FILE\n",
    )


@pytest.mark.parametrize(
    ("secret", "status", "shown"),
    [
        (SECRETS["ci"][0], 0, "ci  push,sign:app-*  expires 2100-01-01T00:00:00Z"),
        (f"{SECRETS['builder'][0]}\n", 0, "builder  read  does not expire"),
        (SECRETS["old"][0], 3, "old  read,browse  expired 2020-01-01T00:00:00Z"),
        (SECRETS["ci"][0][:-1], 3, "not valid: no line of the file has the hash of this token"),
        (SECRETS["ci"][1].sha256.hex(), 3, "not valid: no line of the file has the hash of this token"),
        ("", 3, "not valid: no line of the file has the hash of this token"),
    ],
    ids=["valid", "line", "expired", "wrong", "hash", "empty"],
)
def test_check_reads_the_token_from_standard_input(file: Path, secret: str, status: int, shown: str) -> None:
    checked = harmonia(file, "check", stdin=secret)
    assert (checked.returncode, checked.stdout) == (status, f"{shown}\n")
    assert SECRETS["ci"][0][:20] not in checked.stdout + checked.stderr


def test_revoke_removes_one_line_and_keeps_the_rest_byte_for_byte(file: Path) -> None:
    content = TEXT.encode() + b"\r\n# caf\xe9 \xff   \nbroken line\n# no end of line"
    file.write_bytes(content)
    file.chmod(0o640)
    before = file.stat()
    removed = harmonia(file, "revoke", "ci")
    assert removed.returncode == 0
    assert "SIGHUP" in removed.stderr
    assert file.read_bytes() == content.replace(f"{SECRETS['ci'][1]}\n".encode(), b"")
    after = file.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert after.st_ino != before.st_ino  # a reader of the old file sees it whole
    assert os.listdir(file.parent) == ["tokens"]


def test_revoked_token_is_not_valid(file: Path) -> None:
    assert harmonia(file, "revoke", "builder", "old", "builder").returncode == 0
    assert harmonia(file, "check", stdin=SECRETS["builder"][0]).returncode == 3
    assert harmonia(file, "check", stdin=SECRETS["ci"][0]).returncode == 0


@pytest.mark.parametrize("names", [["build"], ["builder", "build"]], ids=["alone", "after_another"])
def test_revoke_of_an_unknown_name_changes_nothing(file: Path, names: list[str]) -> None:
    before = file.stat()
    refused = harmonia(file, "revoke", *names)
    assert (refused.returncode, refused.stderr) == (
        2,
        f"harmonia: {str(file)!r}: no token 'build'; harmonia token list shows the names\n",
    )
    assert (file.stat().st_ino, file.read_text()) == (before.st_ino, TEXT)


def test_revoke_replaces_the_target_of_a_symlink(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("tokens")
    token_file.revoke(str(link), ["ci"])
    assert link.is_symlink()
    assert "ci" not in file.read_text()


@pytest.mark.root
def test_revoke_keeps_the_owner(file: Path) -> None:
    os.chown(file, 65534, 65534)
    token_file.revoke(str(file), ["ci"])
    assert (file.stat().st_uid, file.stat().st_gid) == (65534, 65534)


def test_revoke_of_a_file_that_cannot_be_written_leaves_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("harmonia.config.token_file.os.replace", fail)
    with pytest.raises(ConfigError, match="Read-only file system; remove the line of the token in the program"):
        token_file.revoke(str(file), ["ci"])
    assert os.listdir(file.parent) == ["tokens"]
    assert file.read_text() == TEXT


def test_tokens_revoked_at_the_same_time_are_all_removed(tmp_path: Path) -> None:
    names = [f"token-{number}" for number in range(40)]
    file = tmp_path / "tokens"
    file.write_text("".join(f"{new(name, ['read'])[1]}\n" for name in names) + "# end\n")
    threads = [threading.Thread(target=token_file.revoke, args=(str(file), [name])) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert file.read_text() == "# end\n"


def test_create_with_a_duration_prints_a_line_that_expires(tmp_path: Path) -> None:
    before = time.time()
    made = run("token", "create", "ci", "--until", "90d")
    file = tmp_path / "tokens"
    file.write_text(next(line for line in made.stdout.splitlines() if " until:" in line))
    [row] = json.loads(harmonia(file, "list", "--json").stdout)
    ends = datetime.fromisoformat(row["expires"]).timestamp()
    assert before - 1 <= ends - 90 * DAY_S <= time.time()


@pytest.mark.parametrize("form", ["2025-01-01", "2025-01-01T12:00:00Z", "%Y-%m-%dT00:00:00Z"])
def test_create_with_a_past_end_is_an_error(form: str) -> None:
    end = time.strftime(form, time.gmtime())
    made = run("token", "create", "ci", "--until", end)
    assert (made.returncode, made.stdout) == (2, "")
    assert f"{end!r} is past; give a later end" in made.stderr


def test_token_called_like_a_command_can_be_created() -> None:
    made = run("token", "create", "list")
    assert made.returncode == 0
    assert "  list  read  sha256:" in made.stdout

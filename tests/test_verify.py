"""`harmonia verify` finds exactly the paths that differ from their registration, and can be continued."""

import errno
import os
import pty
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harmonia.errors import ConfigError
from harmonia.nix import base32
from harmonia.nix.path_info import PathInfo
from harmonia.store.store import Store
from harmonia.tools.fixture_tree import Sparse
from harmonia.tools.store_builder import StoreBuilder
from harmonia.tools.verify import Journal, Result, verify
from support.preloaded import popen
from support.running import HARMONIA, PATIENCE_S, patched, run, wait_until

Verify = Callable[..., list[Result]]


@pytest.fixture
def store(tmp_path: Path) -> StoreBuilder:
    return StoreBuilder(tmp_path / "store")


@pytest.fixture
def config(store: StoreBuilder, tmp_path: Path) -> str:
    file = tmp_path / "harmonia.toml"
    file.write_text(
        f"real_nix_store = '{store.real_dir}'\nnix_db_path = '{store.db_path}'\ncache_dir = '{tmp_path}/cache'\n"
    )
    return str(file)


@pytest.fixture
def verified(store: StoreBuilder, tmp_path: Path) -> Verify:
    opened = Store("/nix/store", store.real_dir, store.db_path)

    def verified(**options: object) -> list[Result]:
        with Journal(str(tmp_path / "journal")) as journal:
            return list(verify(opened, opened.valid_paths()[0], journal, **options))  # type: ignore[arg-type]

    return verified


def full(info: PathInfo) -> str:
    return f"/nix/store/{info.path}"


def file_of(store: StoreBuilder, info: PathInfo) -> Path:
    path = Path(os.fsdecode(store.real_path(info.path)))
    path.chmod(0o644)
    return path


def test_every_fault_is_found_and_described(store: StoreBuilder, verified: Verify) -> None:
    good, changed, longer, gone = (store.add_text(name, b"12345678") for name in ("good", "changed", "longer", "gone"))
    file_of(store, changed).write_bytes(b"12345679")
    file_of(store, longer).write_bytes(b"123456789")
    file_of(store, gone).unlink()
    found = {result.path: result for result in verified(threads=2)}
    assert found.pop(full(good)).state == "good"
    assert found.pop(full(gone))[1:] == ("missing", "registered in the database, but not on disk")
    state, what = found.pop(full(changed))[1:]
    assert state == "corrupt"
    assert f"sha256:{base32.encode(changed.nar_hash)} is registered" in what
    assert found.pop(full(longer))[1:] == (
        "corrupt",
        f"the NAR has {longer.nar_size + 8} bytes, but {longer.nar_size} are registered",
    )
    assert not found


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_path_that_cannot_be_read_is_not_corrupt(
    store: StoreBuilder, verified: Verify, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    info = store.add_text("bad", b"")

    def fail(path: bytes, *_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(os, "readlink", fail)
    real_path = file_of(store, info)
    real_path.unlink()
    real_path.symlink_to("anywhere")
    [result] = verified()
    assert result.state == "unreadable"
    assert result.what == f"{real_path}: {os.strerror(number)}"


def test_unusable_row_is_reported(store: StoreBuilder, verified: Verify) -> None:
    info = store.add(store.output_path("old"), b"", known_size=False)
    [result] = verified()
    assert (result.path, result.state) == (full(info), "unregistered")
    assert "its NAR size is unknown" in result.what


def test_path_garbage_collected_meanwhile_is_not_missing(store: StoreBuilder, tmp_path: Path) -> None:
    infos = [store.add_text(f"text-{number}", b"") for number in range(4)]
    opened = Store("/nix/store", store.real_dir, store.db_path)
    paths = opened.valid_paths()[0]

    def shrinking() -> object:
        for path in paths:
            yield path
            for info in infos:
                if full(info) == path:
                    store.delete(info.path)

    with Journal(str(tmp_path / "journal")) as journal:
        results = list(verify(opened, shrinking(), journal))  # type: ignore[arg-type]
    assert {result.state for result in results} <= {"good"}


class TestJournal:
    def test_good_paths_are_skipped(self, store: StoreBuilder, verified: Verify) -> None:
        infos = [store.add_text(f"text-{number}", b"") for number in range(3)]
        file_of(store, infos[0]).write_bytes(b"corrupt")
        assert sorted(result.state for result in verified(max_age=60)) == ["corrupt", "good", "good"]
        assert [result.state for result in verified(max_age=60)] == ["corrupt"]
        assert len(verified(max_age=0)) == 3

    def test_entries_expire(self, store: StoreBuilder, verified: Verify, tmp_path: Path) -> None:
        store.add_text("text", b"")
        verified()
        journal = tmp_path / "journal"
        age = 3 * 86400
        journal.write_text(re.sub(r"^\d+", str(int(time.time()) - age), journal.read_text()))
        assert not verified(max_age=age + 60)
        assert len(verified(max_age=age - 60)) == 1

    def test_entry_belongs_to_the_content(self, store: StoreBuilder, verified: Verify) -> None:
        path = store.output_path("output")
        store.add(path, b"one")
        assert len(verified(max_age=60)) == 1
        store.delete(path)
        store.add(path, b"two")
        assert len(verified(max_age=60)) == 1

    def test_torn_line_is_tolerated_and_the_journal_is_compacted(
        self, store: StoreBuilder, verified: Verify, tmp_path: Path
    ) -> None:
        store.add_text("text", b"")
        for _ in range(10):
            verified()
        journal = tmp_path / "journal"
        assert journal.read_text().count("\n") < 5
        with journal.open("a") as file:
            file.write("17\nx y z\n179")
        assert not verified(max_age=60)

    def test_second_run_is_rejected(self, tmp_path: Path) -> None:
        with (
            Journal(str(tmp_path / "journal")),
            pytest.raises(ConfigError, match="another `harmonia verify` uses this journal"),
        ):
            Journal(str(tmp_path / "journal"))
        with Journal(str(tmp_path / "journal")):
            pass

    def test_journal_in_the_current_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with Journal("journal"):
            assert (tmp_path / "journal").exists()

    def test_unwritable_journal_is_a_configuration_error(self) -> None:
        with pytest.raises(ConfigError, match=r"cannot write '/proc/journal'.*--journal"):
            Journal("/proc/journal")


class TestCommand:
    def test_quiet_prints_nothing_if_all_is_good(self, store: StoreBuilder, config: str) -> None:
        store.add_text("text", b"")
        answer = run("--config", config, "verify", "--all", "--quiet")
        assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")

    def test_faults_are_on_stdout_with_a_remedy_on_stderr(self, store: StoreBuilder, config: str) -> None:
        good, bad = (store.add_text(name, b"") for name in ("good", "bad"))
        file_of(store, bad).unlink()
        answer = run("--config", config, "verify", "--all")
        assert answer.returncode == 3
        assert answer.stdout == f"missing: {full(bad)}: registered in the database, but not on disk\n"
        assert re.search(r"^2 paths verified in [\d.]+ s: 1 missing$", answer.stderr, re.MULTILINE)
        assert "nix-store --repair-path" in answer.stderr
        assert run("--config", config, "verify", full(good)).returncode == 0

    def test_recursive_includes_references(self, store: StoreBuilder, config: str) -> None:
        bad = store.add_text("bad", b"")
        top = store.add_text("top", b"", [bad.path])
        file_of(store, bad).unlink()
        assert run("--config", config, "verify", full(top)).returncode == 0
        assert run("--config", config, "verify", "--recursive", full(top)).returncode == 3

    def test_interrupted_run_is_continued_as_printed(self, store: StoreBuilder, config: str, tmp_path: Path) -> None:
        count = 100
        for number in range(count):
            store.add_text(f"text-{number}", b"")
        slow = patched(
            "import time, harmonia.tools.verify as v\ncheck = v.check\n"
            "v.check = lambda *of: (time.sleep(0.1), check(*of))[1]"
        )
        journal = tmp_path / "cache/verified"
        command = [*slow, "--config", config, "verify", "--all", "--jobs", "1"]
        with popen(command, env=os.environ, stderr=subprocess.PIPE, text=True) as process:
            wait_until(lambda: journal.exists() and journal.read_text().count("\n") > 2)
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=PATIENCE_S)
        printed = re.fullmatch(r"harmonia: interrupted; to continue, add --max-age (\d+m)\n", stderr)
        assert process.returncode == 130
        assert printed
        done = journal.read_text().count("\n")
        assert done < count
        answer = run("--config", config, "verify", "--all", "--max-age", printed[1])
        assert answer.returncode == 0
        assert answer.stderr.startswith(f"{count - done} paths verified")
        assert f"{done} skipped: all good" in answer.stderr


class TestProgress:
    def on_a_terminal(self, config: str, **environment: str) -> str:
        ours, theirs = pty.openpty()
        with popen(
            [*HARMONIA, "--config", config, "verify", "--all"],
            stderr=theirs,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", **environment},
        ) as process:
            os.close(theirs)
            shown = b""
            while True:
                try:
                    shown += os.read(ours, 4096)
                except OSError:  # the program has ended
                    break
        os.close(ours)
        assert process.returncode == 0
        return shown.decode()

    def test_terminal_shows_rate_and_remaining_time(self, store: StoreBuilder, config: str) -> None:
        store.add(store.output_path("large"), Sparse(300 << 20))
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.on_a_terminal(config))
        assert re.search(r"verifying .*\d+% .*/300\.0 MiB .*\d+:\d\d:\d\d", shown)
        assert re.search(r"[\d.]+ [kMG]B/s", shown)

    def test_no_color_is_respected(self, store: StoreBuilder, config: str) -> None:
        store.add_text("text", b"")
        colour = re.compile(r"\x1b\[[0-9;]*[39][0-7]m")
        assert colour.search(self.on_a_terminal(config))
        assert not colour.search(self.on_a_terminal(config, NO_COLOR="1"))

    def test_progress_is_only_shown_on_terminals(self, store: StoreBuilder, config: str) -> None:
        store.add_text("text", b"")
        answer = run("--config", config, "verify", "--all")
        assert re.fullmatch(r"1 paths verified in [\d.]+ s: all good\n", answer.stderr)

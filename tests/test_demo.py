"""The demo store is a real store: Nix verifies it without errors."""

import base64
import bz2
import hashlib
import json
import os
import platform
import re
import shutil
import sqlite3
import subprocess
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from harmonia.errors import ConfigError
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey
from harmonia.store.store import Store
from harmonia.tools import demo
from harmonia.tools.demo import Demo
from harmonia.tools.fixture_tree import Executable, Sparse, Symlink, Tree, remove_tree
from harmonia.tools.store_builder import StoreBuilder
from support.programs import needs, needs_root
from support.running import PATIENCE_S, Server, run

NOBODY = 65534

needs_nix = needs("nix-store")

Nix = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def made(tmp_path: Path) -> Demo:
    return demo.make(str(tmp_path / "demo"))


@pytest.fixture
def nix(tmp_path: Path) -> Nix:
    """Return a function that runs a command of Nix, with only the given stores."""
    config = "experimental-features = nix-command\nsubstituters =\nbuild-users-group =\n"
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "NIX_CONFIG": config}

    def run(*command: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE_S)

    return run


def root(directory: str | os.PathLike[str]) -> str:
    return f"local?root={directory}"


def infos(made: Demo) -> Iterator[PathInfo]:
    database = f"{made.directory}/nix/var/nix/db/db.sqlite"
    store = Store("/nix/store", f"{made.directory}/nix/store", database)
    for path in made.paths.values():
        info = store.path_info(path.hash_part)
        assert info is not None
        yield info
    store.database.close()


def snapshot(directory: str) -> dict[str, tuple[int, int]]:
    """Return inode and change time of every file, except the files that SQLite keeps beside a database in use."""
    found = {}
    for parent, directories, files in os.walk(directory):
        for name in directories + files:
            status = os.lstat(f"{parent}/{name}")
            if not name.startswith("db"):
                found[f"{parent}/{name}"] = (status.st_ino, status.st_ctime_ns)
    return found


@pytest.mark.nix
@needs_nix
class TestNixAgrees:
    def test_nix_store_verify_finds_no_error(self, made: Demo, nix: Nix) -> None:
        verified = nix("nix-store", "--store", root(made.directory), "--verify", "--check-contents")
        assert verified.returncode == 0
        assert "error" not in verified.stderr
        assert "warning" not in verified.stderr

    def test_nix_path_info_shows_the_same(self, made: Demo, nix: Nix) -> None:
        shown = nix("nix", "path-info", "--store", root(made.directory), "--all", "--json", "--sigs")
        theirs = {entry["path"]: entry for entry in json.loads(shown.stdout)}
        for info in infos(made):
            entry = theirs.pop(f"/nix/store/{info.path}")
            assert entry["narHash"] == f"sha256-{base64.b64encode(info.nar_hash).decode()}"
            assert entry["narSize"] == info.nar_size
            assert sorted(entry["references"]) == [f"/nix/store/{reference}" for reference in info.references]
            assert entry.get("deriver") == (f"/nix/store/{info.deriver}" if info.deriver else None)
            assert entry.get("ca") == info.ca
            assert tuple(entry.get("signatures", ())) == info.sigs
        assert not theirs

    def test_nix_store_dump_has_the_registered_hashes(self, made: Demo) -> None:
        for info in infos(made):
            dump = ["nix-store", "--dump", f"{made.directory}/nix/store/{info.path}"]
            nar = subprocess.run(dump, capture_output=True, check=True).stdout
            assert (hashlib.sha256(nar).digest(), len(nar)) == (info.nar_hash, info.nar_size)

    def test_nix_accepts_content_addressed_paths_unsigned_and_all_others_signed(
        self, made: Demo, nix: Nix, tmp_path: Path
    ) -> None:
        def copy(*options: str) -> "subprocess.CompletedProcess[str]":
            stores = ("--from", root(made.directory), "--to", root(tmp_path / "copy"))
            return nix("nix", "copy", *stores, *options, "--option", "require-sigs", "true")

        unsigned = {info.path for info in infos(made) if info.ca}
        signed = {info.path for info in infos(made) if info.sigs}
        assert len(unsigned) + len(signed) == len(made.paths)
        for name in (
            "build.sh",
            "hello-2.13.0-source",
            "hello-manual-2.13.0",
            "python-modules-" + platform.python_version(),
        ):
            assert copy(f"/nix/store/{made.paths[name]}").returncode == 0
        refused = copy("--all")
        assert refused.returncode != 0
        assert "lacks a valid signature" in refused.stderr
        trusted = copy("--all", "--option", "trusted-public-keys", str(made.public_key))
        assert trusted.returncode == 0, trusted.stderr

    def test_nix_store_add_gives_the_same_path(self, nix: Nix, tmp_path: Path) -> None:
        source = tmp_path / "source-1.0"
        source.mkdir()
        (source / "program").write_bytes(b"#!/bin/sh\n")
        (source / "program").chmod(0o700)
        (source / os.fsdecode(b"\xff")).symlink_to("program")
        (source / "empty").mkdir()
        (source / "zeros").write_bytes(bytes(100_000))
        tree: Tree = {
            "program": Executable(b"#!/bin/sh\n"),
            b"\xff": Symlink("program"),
            "empty": {},
            "zeros": Sparse(100_000),
        }
        added = nix("nix-store", "--store", root(tmp_path / "theirs"), "--add", str(source)).stdout.strip()
        assert added == f"/nix/store/{StoreBuilder(tmp_path / 'copied').add_source('source-1.0', source).path}"
        assert added == f"/nix/store/{StoreBuilder(tmp_path / 'described').add_source('source-1.0', tree).path}"

    def test_printed_copy_command_works_for_two_demo_stores_with_different_keys(
        self, nix: Nix, tmp_path: Path, new_port: Callable[[], int]
    ) -> None:
        bind = f"127.0.0.1:{new_port()}"  # the same URL, because Nix remembers what it fetched from there
        for number in (1, 2):
            copy, directory = tmp_path / f"copy-{number}", tmp_path / f"demo-{number}"
            printed = re.search(r"(?m)^  (nix (?:.*\\\n)*.*)", run("demo", str(directory)).stdout)
            assert printed
            server = Server(tmp_path / f"server-{number}", directory, bind=bind)
            server.start()
            command = printed[1].replace("http://localhost:5000", server.url).replace("/tmp/demo-copy", str(copy))
            copied = nix("sh", "-c", command)
            assert server.stop() == 0
            assert copied.returncode == 0, copied.stderr
            assert any(path.name.endswith("-hello-2.13.0") for path in (copy / "nix/store").iterdir())

    @pytest.mark.root
    @needs_root
    @pytest.mark.parametrize("name", ["libgreet-1.2.0", "hello-2.13.0", "json-pretty-1.0"])
    def test_nix_rebuilds_a_derivation_with_the_same_output_and_log(self, made: Demo, nix: Nix, name: str) -> None:
        derivation = f"/nix/store/{made.paths[f'{name}.drv']}"
        programs = " ".join(path for path in ("/bin", "/usr", "/lib", "/lib64") if os.path.exists(path))
        store = ("--store", root(made.directory))
        logged = nix("nix", "log", *store, derivation)
        built = nix("nix-store", *store, "--realise", "--check", derivation, "--option", "sandbox-paths", programs)
        assert built.returncode == 0, built.stderr
        assert logged.stdout
        assert logged.stdout in built.stderr


def test_demo_store_has_paths_of_all_kinds(made: Demo) -> None:
    found = {info.path.name: info for info in infos(made)}
    assert {info.ca.split(":")[0] if info.ca else "" for info in found.values()} == {"fixed", "text", ""}
    assert 1_000_000 < sum(info.nar_size for info in found.values()) < 5_000_000
    hello = found["hello-2.13.0"]
    assert hello.references == tuple(sorted([hello.path, found["libgreet-1.3.0"].path]))
    assert found["libgreet-1.2.0"].path in found["hello-2.12.1"].references
    assert hello.deriver == found["hello-2.13.0.drv"].path
    [signature] = hello.sigs
    assert made.public_key.verify(hello.fingerprint("/nix/store"), signature)
    closure = {found["demo-environment"].path}
    while more := {ref for info in found.values() if info.path in closure for ref in info.references} - closure:
        closure |= more
    assert closure >= {found[name].path for name in ("hello-2.13.0", "json-pretty-1.0", "hello-manual-2.13.0")}
    assert os.path.exists(f"{made.directory}/nix/store/{made.paths['hello-manual-2.13.0']}/index.html")


def test_files_have_the_modes_and_times_of_nix(made: Demo) -> None:
    for path in made.paths.values():
        top = f"{made.directory}/nix/store/{path}"
        below = [f"{parent}/{name}" for parent, dirs, files in os.walk(top) for name in dirs + files]
        for found in (top, *below):
            status = os.lstat(found)
            assert status.st_mtime == 1
            assert status.st_mode & 0o7777 in (0o444, 0o555) or os.path.islink(found)


def test_build_log_is_at_the_place_of_nix(made: Demo) -> None:
    derivation = made.paths["hello-2.13.0.drv"]
    with bz2.open(f"{made.directory}/nix/var/log/nix/drvs/{derivation[:2]}/{derivation[2:]}.bz2") as log:
        assert log.read().startswith(b"installing hello-2.13.0 as /nix/store/")


def test_programs_run_in_place(made: Demo) -> None:
    def output(name: str, program: str, *arguments: str, given: str = "") -> str:
        path = f"{made.directory}/nix/store/{made.paths[name]}/bin/{program}"
        return subprocess.run([path, *arguments], input=given, capture_output=True, text=True, check=True).stdout

    assert output("hello-2.12.1", "hello", "--version") == "hello 2.12.1\n"
    assert output("hello-2.12.1", "hello") == "Hello, world!\n"
    assert output("hello-2.13.0", "hello", "Ada", "Grace") == "Hello, Ada!\nHello, Grace!\n"
    assert output("json-pretty-1.0", "json-pretty", given='{"a":1}') == '{\n  "a": 1\n}\n'


def test_secret_key_is_private_and_signed_the_paths(made: Demo) -> None:
    secret = Path(made.directory, "secret-key")
    assert secret.stat().st_mode & 0o777 == 0o600
    key = SecretKey.parse(secret.read_text())
    public = Path(made.directory, "public-key").read_text()
    assert public == str(key.public_key) == str(made.public_key)
    assert key.name == "demo-1"


def test_settings_name_existing_files(tmp_path: Path) -> None:
    made = demo.make(str(tmp_path / 'an "odd" \\ directory ☃'))
    with open(made.config_path, "rb") as file:
        settings = tomllib.load(file)
    assert settings == {
        "real_nix_store": f"{made.directory}/nix/store",
        "nix_db_path": f"{made.directory}/nix/var/nix/db/db.sqlite",
        "sign_key_paths": [f"{made.directory}/secret-key"],
        "browse": True,
    }
    assert all(os.path.exists(path) for path in (settings["nix_db_path"], *settings["sign_key_paths"]))


class TestRepeatedRun:
    def test_complete_store_is_kept(self, made: Demo) -> None:
        before = snapshot(made.directory)
        again = demo.make(made.directory)
        assert (again.paths, str(again.public_key)) == (made.paths, str(made.public_key))
        assert snapshot(made.directory) == before

    def test_added_paths_are_kept(self, made: Demo) -> None:
        StoreBuilder(made.directory).add_source("mine", b"added")
        before = snapshot(made.directory)
        assert "mine" in demo.make(made.directory).paths
        assert snapshot(made.directory) == before

    @pytest.mark.parametrize("step", ["connect", "add_source", "add", "add_derivation", "add_log"])
    def test_interrupted_run_is_repaired(self, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(StoreBuilder, step, interrupt)
            with pytest.raises(KeyboardInterrupt):
                demo.make(str(tmp_path / "demo"))
        assert not (tmp_path / "demo").exists()
        made = demo.make(str(tmp_path / "demo"))
        assert len(list(infos(made))) == len(made.paths)
        assert os.listdir(tmp_path) == ["demo"]

    @pytest.mark.parametrize(
        "part",
        [
            "secret-key",
            "nix/var/nix/db/db.sqlite",
            "nix/store/*-hello-manual-2.13.0",
            "nix/store/*-build.sh",
            "nix/store",
        ],
    )
    def test_missing_part_is_repaired(self, made: Demo, part: str) -> None:
        for path in Path(made.directory).glob(part):
            remove_tree(os.fsencode(path))
        again = demo.make(made.directory)
        assert len(list(infos(again))) == len(again.paths) == len(made.paths)
        assert os.path.exists(f"{made.directory}/secret-key")

    def test_empty_directory_is_filled(self, tmp_path: Path) -> None:
        (tmp_path / "demo").mkdir()
        assert demo.make(str(tmp_path / "demo")).paths

    @pytest.mark.parametrize("content", ["nix/store/precious", "harmonia.toml", "thesis.tex"])
    def test_foreign_directory_is_left_alone(self, tmp_path: Path, content: str) -> None:
        precious = tmp_path / "demo" / content
        precious.parent.mkdir(parents=True)
        precious.write_text("priority = 1\n")
        with pytest.raises(ConfigError, match="is not a demo store"):
            demo.make(str(tmp_path / "demo"))
        assert precious.read_text() == "priority = 1\n"

    def test_concurrent_runs_make_one_store(self, tmp_path: Path) -> None:
        with ThreadPoolExecutor(4) as pool:
            made = list(pool.map(demo.make, [str(tmp_path / "demo")] * 4))
        assert len({str(one.public_key) for one in made}) == 1
        assert os.listdir(tmp_path) == ["demo"]


@pytest.mark.root
@needs_root
def test_another_user_can_remove_the_demo_store_as_documented(made: Demo) -> None:
    directory = tempfile.mkdtemp()  # tmp_path is in a directory that only root can enter
    os.chown(directory, NOBODY, NOBODY)
    shutil.move(made.directory, f"{directory}/demo")
    subprocess.run(["chown", "-hR", f"{NOBODY}:{NOBODY}", directory], check=True)

    def run(command: str) -> int:
        shell = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "sh", "-c", command)
        return subprocess.run(shell, cwd=directory, stderr=subprocess.DEVNULL, check=False).returncode

    assert run("rm -rf demo") != 0
    assert run("chmod -R u+w demo && rm -rf demo") == 0
    os.rmdir(directory)


class TestBuilder:
    def test_add_registers_all_attributes(self, tmp_path: Path) -> None:
        key = SecretKey.generate("test-1")
        builder = StoreBuilder(tmp_path)
        other = builder.add_source("other", b"other")
        path = builder.output_path("mine")
        info = builder.add(
            path,
            {"me": f"/nix/store/{path}".encode()},
            references=[path, other.path],
            deriver=builder.output_path("mine.drv"),
            keys=[key],
            sigs=["elsewhere-1:abc"],
            ca="fixed:r:sha256:" + "0" * 52,
        )
        store = Store("/nix/store", builder.real_dir, builder.db_path)
        assert store.path_info(path.hash_part) == info
        assert info.sigs[0] == "elsewhere-1:abc"
        assert key.public_key.verify(info.fingerprint("/nix/store"), info.sigs[1])
        store.database.close()

    def test_size_may_be_unknown(self, tmp_path: Path) -> None:
        builder = StoreBuilder(tmp_path)
        info = builder.add(builder.output_path("old"), b"", known_size=False)
        assert info.nar_size == 112
        with builder.connect() as connection:
            assert connection.execute("select narSize from ValidPaths").fetchall() == [(None,)]

    def test_references_must_exist_and_prevent_deletion(self, tmp_path: Path) -> None:
        builder = StoreBuilder(tmp_path)
        stranger = builder.output_path("stranger")
        with pytest.raises(sqlite3.IntegrityError):
            builder.add(builder.output_path("mine"), b"", references=[stranger])
        base = builder.add_source("base", b"")
        builder.add_source("top", b"", [base.path])
        with pytest.raises(sqlite3.IntegrityError):
            builder.delete(base.path)
        assert os.path.exists(builder.real_path(base.path))

    def test_delete_removes_rows_and_files(self, tmp_path: Path) -> None:
        builder = StoreBuilder(tmp_path)
        own = builder.output_path("own")
        builder.add(own, {"directory": {"file": b""}}, references=[own])
        derivation, _ = builder.add_derivation("d", "/bin/sh")
        builder.delete(own)
        builder.delete(derivation.path)
        assert os.listdir(builder.real_dir) == []
        with builder.connect() as connection:
            for table in ("ValidPaths", "Refs", "DerivationOutputs"):
                assert connection.execute(f"select * from {table}").fetchall() == []

    def test_another_store_dir_changes_the_computed_paths(self, tmp_path: Path) -> None:
        here, there = StoreBuilder(tmp_path / "1"), StoreBuilder(tmp_path / "2", "/gnu/store")
        info = there.add_source("same", b"")
        assert here.add_source("same", b"").path != info.path
        store = Store("/gnu/store", there.real_dir, there.db_path)
        assert store.path_info(info.path.hash_part) == info
        store.database.close()

    def test_existing_store_is_opened(self, tmp_path: Path) -> None:
        info = StoreBuilder(tmp_path).add_source("kept", b"")
        StoreBuilder(tmp_path).add_source("second", b"", [info.path])

    def test_logs_are_compressed_or_plain(self, tmp_path: Path) -> None:
        builder = StoreBuilder(tmp_path)
        derivation = builder.output_path("a.drv")
        assert bz2.decompress(Path(builder.add_log(derivation, b"text")).read_bytes()) == b"text"
        assert Path(builder.add_log(derivation, b"text", compressed=False)).read_bytes() == b"text"

"""`harmonia ls`, `cat` and `nar …` print exactly what Nix prints, and behave well in pipes."""

import hashlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from harmonia.nix.path_info import PathInfo
from harmonia.store import file_reader, tree_reader
from harmonia.tools.fixture_tree import Executable, Sparse, Symlink, Tree
from harmonia.tools.store_builder import StoreBuilder
from support.preloaded import popen
from support.programs import needs
from support.running import HARMONIA, PATIENCE_S, run, run_binary

TREE: Tree = {
    "bin": {"run": Executable(b"#!/bin/sh\n"), "link": Symlink("run")},
    "empty": b"",
    "empty-dir": {},
    "large": Sparse(300_000),
    'odd "names"\n': {"\\": b"odd"},
    "Ünïcödé-☃": b"\n",
}

Nix = Callable[..., bytes]

needs_nix = [
    pytest.mark.nix,
    needs("nix"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> StoreBuilder:
    return StoreBuilder(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def tree(store: StoreBuilder) -> PathInfo:
    return store.add_source("tree", TREE)


@pytest.fixture(scope="module")
def config(store: StoreBuilder) -> str:
    file = Path(store.real_dir).parents[1] / "harmonia.toml"
    file.write_text(f"real_nix_store = '{store.real_dir}'\nnix_db_path = '{store.db_path}'\n")
    return str(file)


@pytest.fixture(scope="module")
def archive(store: StoreBuilder, tree: PathInfo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("nar") / "tree.nar"
    file.write_bytes(b"".join(file_reader.read(tree_reader.dump(store.real_path(tree.path)))))
    return file


def harmonia(*arguments: str, config: str = "", stdin: bytes = b"") -> bytes:
    done = run_binary(*(["--config", config] if config else []), *arguments, stdin=stdin)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout


@pytest.fixture
def nix(tmp_path: Path) -> Nix:
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "NIX_CONFIG": "experimental-features = nix-command",
    }
    return lambda *arguments: (
        subprocess.run(arguments, capture_output=True, timeout=PATIENCE_S, env=environment, check=True).stdout
    )


@pytest.fixture
def nix_store(store: StoreBuilder, nix: Nix) -> Nix:
    """Return a function that runs `nix store` on our store."""
    root = f"local?root={Path(store.real_dir).parents[1]}"
    return lambda command, *arguments: nix("nix", "store", command, "--store", root, *arguments)


def normal(listing: bytes) -> object:
    """Parse a listing, without "executable": false, which Nix 2.34 and older omit."""
    return json.loads(listing, object_hook=lambda node: node if node.get("executable") else _less(node, "executable"))


def _less(node: dict[str, object], key: str) -> dict[str, object]:
    return {name: value for name, value in node.items() if name != key}


class TestSameOutputAsNix:
    pytestmark = needs_nix

    @pytest.mark.parametrize("inside", ["", "/bin", "/bin/run", "/bin/link", "/empty-dir"])
    @pytest.mark.parametrize("options", ["", "-l", "-R", "-lR", "-d", "-ldR"])
    def test_ls_of_a_store_path(self, tree: PathInfo, config: str, nix_store: Nix, options: str, inside: str) -> None:
        words = [*options.split(), f"/nix/store/{tree.path}{inside}"]
        assert harmonia("ls", *words, config=config) == nix_store("ls", *words)

    @pytest.mark.parametrize("inside", ["", "/bin", "/bin/run", "/bin/link", "/empty-dir"])
    @pytest.mark.parametrize("options", ["--json", "--json -R"])
    def test_json_ls_of_a_store_path(
        self, tree: PathInfo, config: str, nix_store: Nix, options: str, inside: str
    ) -> None:
        words = [*options.split(), f"/nix/store/{tree.path}{inside}"]
        assert normal(harmonia("ls", *words, config=config)) == normal(nix_store("ls", *words))

    @pytest.mark.parametrize("inside", ["/", "/bin", "/bin/run", "/bin/link", "/empty-dir"])
    @pytest.mark.parametrize("options", ["--json", "--json -R"])
    def test_json_ls_of_a_nar(self, archive: Path, nix: Nix, options: str, inside: str) -> None:
        words = ["nar", "ls", *options.split(), str(archive), inside]
        assert normal(harmonia(*words)) == normal(nix("nix", *words))

    @pytest.mark.parametrize("inside", ["/", "/bin", "/bin/run", "/bin/link", "/empty-dir"])
    @pytest.mark.parametrize("options", ["", "-l", "-R", "-lR", "-d"])
    def test_nar_ls_prints_the_same_as_nix(self, archive: Path, nix: Nix, options: str, inside: str) -> None:
        words = ["nar", "ls", *options.split(), str(archive), inside]
        assert harmonia(*words) == nix("nix", *words)

    @pytest.mark.parametrize("name", ["large", "empty", "bin/run"])
    def test_cat_prints_the_same_as_nix(self, tree: PathInfo, config: str, nix_store: Nix, name: str) -> None:
        path = f"/nix/store/{tree.path}/{name}"
        assert harmonia("cat", path, config=config) == nix_store("cat", path)

    def test_dump_and_restore(self, store: StoreBuilder, tree: PathInfo, nix: Nix, tmp_path: Path) -> None:
        real_path = os.fsdecode(store.real_path(tree.path))
        theirs = nix("nix-store", "--dump", real_path)
        assert harmonia("nar", "dump", real_path) == theirs
        assert harmonia("nar", "restore", str(tmp_path / "ours"), stdin=theirs) == b""
        subprocess.run(["nix-store", "--restore", str(tmp_path / "theirs")], input=theirs, check=True)
        for restored in ("ours", "theirs"):
            assert nix("nix-store", "--dump", str(tmp_path / restored)) == theirs
        modes = [[path.lstat().st_mode for path in sorted((tmp_path / name).rglob("*"))] for name in ("ours", "theirs")]
        assert modes[0] == modes[1]


@pytest.fixture
def result(tree: PathInfo, tmp_path: Path) -> Path:
    link = tmp_path / "result"
    link.symlink_to(f"/nix/store/{tree.path}")
    return link


def test_path_is_accepted_in_every_form(store: StoreBuilder, tree: PathInfo, config: str, result: Path) -> None:
    forms = (f"/nix/store/{tree.path}", os.fsdecode(store.real_path(tree.path)), tree.path, tree.path.hash_part)
    for form in (*forms, str(result)):
        assert harmonia("cat", f"{form}/bin/run", config=config) == b"#!/bin/sh\n"
    assert harmonia("cat", f"{result}/bin/run", f"{result}/empty", f"{result}/bin/run", config=config).count(b"#") == 2


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        ("/bin", "is not a regular file; `harmonia ls -l` shows its type"),
        ("/bin/link", "is not a regular file"),
        ("/none", "No such file or directory"),
    ],
)
def test_cat_of_a_non_file_fails(config: str, result: Path, inside: str, message: str) -> None:
    answer = run("--config", config, "cat", f"{result}{inside}")
    assert (answer.returncode, answer.stdout, answer.stderr.count("\n")) == (1, "", 1)
    assert message in answer.stderr


def test_names_that_are_not_utf8_are_printed_unchanged(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "tree") + b"/\xff")).touch()
    dumped = harmonia("nar", "dump", str(tmp_path / "tree"))
    assert harmonia("nar", "ls", "-", stdin=dumped) == b"./\xff\n"
    assert b'"\xff":' in harmonia("nar", "ls", "--json", "-", stdin=dumped)


def test_nars_are_piped(archive: Path) -> None:
    command = " ".join(HARMONIA)
    shell = f"{command} nar dump {archive} | {command} nar ls -l - && {command} nar ls -d - < {archive}"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, timeout=PATIENCE_S, check=True)
    assert done.stdout == f"-r--r--r-- {archive.stat().st_size:20} \n.\n".encode()


@pytest.mark.parametrize("arguments", [("nar", "ls", "-R"), ("nar", "dump")])
def test_closed_output_ends_silently_by_sigpipe(arguments: tuple[str, ...], tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(2000):
        (tree / f"{number:0200}").write_bytes(bytes(400))
    source = tree
    if arguments[1] == "ls":
        source = tmp_path / "nar"
        source.write_bytes(harmonia("nar", "dump", str(tree)))
    command = [*HARMONIA, *arguments, str(source)]
    with popen(command, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.wait(PATIENCE_S) == -signal.SIGPIPE
        assert process.stderr.read() == b""


def test_large_file_takes_little_memory(tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(600 << 20)
    program = (
        "import resource, sys\nresource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))\n"
        "from harmonia.cli import main\nmain(prog_name='harmonia')"
    )
    command = [HARMONIA[0], "-c", program, "nar"]
    with subprocess.Popen([*command, "dump", str(large)], stdout=subprocess.PIPE) as dump:
        listed = subprocess.run([*command, "ls", "-l", "-"], stdin=dump.stdout, capture_output=True, check=True)
    assert dump.returncode == 0
    assert str(600 << 20).encode() in listed.stdout


def test_damaged_nar_is_reported_in_one_line(archive: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.nar"
    cut.write_bytes(archive.read_bytes()[:-40])
    for arguments in (["ls", str(cut)], ["restore", str(tmp_path / "out"), str(cut)]):
        answer = run("nar", *arguments)
        assert answer.returncode == 1
        assert answer.stderr == f"harmonia: {cut} is not a complete NAR: the archive ends early; download it again\n"


@pytest.mark.parametrize("arguments", [["ls"], ["restore", "out"]])
def test_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    answer = run("nar", *arguments, "/proc/self/mem")  # its first bytes are unreadable
    assert (answer.returncode, answer.stderr) == (1, "harmonia: /proc/self/mem: Input/output error\n")


def test_missing_path_in_a_nar_is_reported(archive: Path) -> None:
    answer = run("nar", "ls", str(archive), "/none")
    assert answer.returncode == 1
    assert answer.stderr == "harmonia: '/none' is not in the NAR; list the whole NAR with -R and no PATH\n"


def test_existing_target_is_not_overwritten(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    (tmp_path / "directory").mkdir()
    for name in ("out", "directory"):
        answer = run("nar", "restore", str(tmp_path / name), str(archive))
        assert answer.returncode == 2
        assert re.fullmatch(rf"harmonia: {tmp_path / name} already exists; name a path .*\n", answer.stderr)
    assert (tmp_path / "out").read_text() == "mine"


def test_dumped_nar_equals_the_registration(store: StoreBuilder, tree: PathInfo) -> None:
    dumped = harmonia("nar", "dump", os.fsdecode(store.real_path(tree.path)))
    assert (hashlib.sha256(dumped).digest(), len(dumped)) == (tree.nar_hash, tree.nar_size)

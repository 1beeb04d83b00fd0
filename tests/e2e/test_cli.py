"""`harmonia ls`, `cat`, `nar`, `keygen` and `verify` agree with every version of Nix about its own store."""

import json
import subprocess

import pytest

from support.nix_client import Client
from support.running import run, run_binary

_TREE = """
derivation {
  name = "tree";
  system = builtins.currentSystem;
  builder = "/bin/sh";
  args = [ "-c" ''
    mkdir -p $out/bin $out/empty; echo run > $out/bin/run; chmod +x $out/bin/run
    ln -s run $out/bin/link; echo text > $out/text
  '' ];
  PATH = "/usr/bin:/bin";
}
"""


@pytest.fixture
def tree(client: Client) -> str:
    [path] = client.build(_TREE)
    return path


def harmonia(client: Client, *arguments: str, stdin: bytes = b"") -> bytes:
    config = client.shared / "tools.toml"
    config.write_text(f"real_nix_store = '{client.store_dir}'\nnix_db_path = '{client.db_path}'\n")
    done = run_binary("--config", str(config), *arguments, stdin=stdin)
    done.check_returncode()
    return done.stdout


def test_ls_and_cat_print_the_same_as_nix(client: Client, tree: str) -> None:
    for words in ([], ["-l"], ["-lR"], ["-d"]):
        assert harmonia(client, "ls", *words, tree) == client.run("nix", "store", "ls", *words, tree).stdout
    for words in (["--json", "-R", tree], ["--json", tree], ["--json", f"{tree}/text"], ["--json", f"{tree}/bin/link"]):
        same_json(client, harmonia(client, "ls", *words), client.run("nix", "store", "ls", *words).stdout)
    path = f"{tree}/text"
    assert harmonia(client, "cat", path) == client.run("nix", "store", "cat", path).stdout == b"text\n"


def test_nar_dump_ls_and_restore_equal_those_of_nix(client: Client, tree: str) -> None:
    dumped = client.run("nix-store", "--dump", tree).stdout
    assert harmonia(client, "nar", "dump", str(client.real_path(tree))) == dumped
    archive = client.shared / "tree.nar"
    archive.write_bytes(dumped)
    for words in (["-R"], ["-lR"]):
        theirs = client.run("nix", "nar", "ls", *words, archive, "/").stdout
        assert harmonia(client, "nar", "ls", *words, "-", stdin=dumped) == theirs
    for words in (["--json", "-R", str(archive), "/"], ["--json", str(archive), "/bin"]):
        same_json(client, harmonia(client, "nar", "ls", *words), client.run("nix", "nar", "ls", *words).stdout)
    restored = client.shared / "restored"
    harmonia(client, "nar", "restore", str(restored), str(archive))
    assert client.run("nix-store", "--dump", restored).stdout == dumped


def same_json(client: Client, ours: bytes, theirs: bytes) -> None:
    """Compare listings. Nix 2.34 and older omit `"executable": false`, and Nix 2.8 has another order."""
    if client.nix.version < (2, 35):
        ours = ours.replace(b'"executable":false,', b"")
    if client.nix.version < (2, 26):
        assert json.loads(ours) == json.loads(theirs)
    else:
        assert ours == theirs


def test_nix_signs_with_a_key_of_keygen(client: Client) -> None:
    assert run("keygen", "cache-1", str(client.shared)).returncode == 0
    secret = (client.shared / "cache-1.secret").read_bytes()
    public = client.run("nix", "key", "convert-secret-to-public", stdin=secret).text
    assert public == (client.shared / "cache-1.public").read_text()


def test_verify_accepts_a_store_made_by_nix(client: Client, tree: str) -> None:
    arguments = ["verify", "--all", "--quiet", "--journal", str(client.shared / "journal")]
    assert harmonia(client, *arguments) == b""
    text = client.real_path(f"{tree}/text")
    text.chmod(0o644)
    text.write_text("TEXT\n")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        harmonia(client, *arguments)
    assert failed.value.returncode == 3
    assert failed.value.stdout.startswith(f"corrupt: {tree}: ".encode())
    theirs = client.run("nix-store", "--verify", "--check-contents", check=False)
    assert tree in theirs.stderr

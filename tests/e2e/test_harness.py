"""The test harness: Nix clients are real, check signatures, share nothing, and leave nothing behind."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from support.closure import Closure, make_closure
from support.nix_client import Client, Nix
from support.running import wait_until

MakeClient = Callable[[str], Client]


def holds(client: Client, path: str) -> bool:
    return client.run("nix-store", "--check-validity", path, check=False).returncode == 0


def test_client_accepts_only_signed_paths(make_client: MakeClient, tmp_path: Path) -> None:
    server, client = make_client("server"), make_client("client")
    made = make_closure(server)
    cache = f"file://{tmp_path}/cache?compression=none"

    server.run("nix", "copy", "--to", cache, made.top)
    client.settings |= {"substituters": cache, "trusted-public-keys": made.key.public}
    refused = client.run("nix-store", "--realise", made.top, check=False)
    assert refused.returncode != 0
    assert "not signed by any of the keys" in refused.stderr
    assert client.run("nix", "copy", "--from", cache, made.top, check=False).returncode != 0
    assert not holds(client, made.top)

    server.run("nix", "store", "sign", "--recursive", "--key-file", made.key.secret_file, made.top)
    signed = f"file://{tmp_path}/signed?compression=none"
    server.run("nix", "copy", "--to", signed, made.top)
    client.settings["substituters"] = signed
    client.run("nix-store", "--realise", made.top)
    fetched = client.run("nix-store", "--query", "--requisites", made.top).lines
    assert fetched == server.run("nix-store", "--query", "--requisites", made.top).lines
    client.run("nix-store", "--verify-path", *fetched)
    client.run("nix", "store", "verify", "--recursive", made.top)

    stranger = make_client("stranger")
    stranger.settings["substituters"] = signed
    assert stranger.run("nix-store", "--realise", made.top, check=False).returncode != 0


def test_copied_nars_are_identical(make_client: MakeClient, tmp_path: Path) -> None:
    server, client = make_client("server"), make_client("client")
    made = make_closure(server)
    cache = f"file://{tmp_path}/cache?compression=none"
    server.run("nix", "copy", "--to", cache, *made.paths.values())
    client.run("nix", "copy", "--no-check-sigs", "--from", cache, *made.paths.values())
    for path in made.paths.values():
        assert client.run("nix-store", "--dump", path).stdout == server.run("nix-store", "--dump", path).stdout


def test_clients_share_nothing(make_client: MakeClient) -> None:
    one, other = make_client("one"), make_client("other")
    path = one.run("nix-store", "--add", one.generate_key("key-1").secret_file).text
    one.settings["trusted-public-keys"] = "key-1:"
    one.run("touch", "/root/mine", "/tmp/mine")
    assert holds(one, path)
    assert one.real_path(path).is_file()
    assert one.db_path.is_file()

    assert not holds(other, path)
    assert not other.real_path(path).exists()
    assert other.run("ls", "/root").text == ""
    assert "mine" not in other.run("ls", "/tmp").lines
    assert "key-1" not in other.environment["NIX_CONFIG"]
    assert not Path(path).exists()


def test_client_can_delete_paths(client: Client) -> None:
    path = client.run("nix-store", "--add", "/etc/passwd").text
    client.run("nix-store", "--delete", path)
    assert not client.real_path(path).exists()
    path = client.run("nix-store", "--add", "/etc/passwd").text
    client.run("nix-collect-garbage")
    assert not client.real_path(path).exists()


def test_client_keeps_build_logs(client: Client) -> None:
    made = make_closure(client)
    assert client.run("nix", "log", made.paths["tree-1.0"]).text == "building tree-1.0"
    assert any(client.log_dir.glob("drvs/??/*-tree-1.0.drv.bz2"))


def test_failure_shows_command_status_and_stderr(client: Client) -> None:
    with pytest.raises(AssertionError, match=r"exit status 3:\nbecause"):
        client.run("sh", "-c", "echo because >&2; exit 3")


def test_timeout_leaves_nothing_behind(client: Client, tmp_path: Path) -> None:
    mark = f"8765.{os.getpid()}"  # a unique number of seconds
    for seconds in (0.5, 5.0, 50.0):  # the command must have begun, which takes long on a busy machine
        with pytest.raises(TimeoutError, match=rf"not done after {seconds} s:\n") as late:
            client.run("sh", "-c", f"echo started >&2; setsid sleep {mark} & sleep {mark}", timeout=seconds)
        if has_started := "\nstarted" in str(late.value):
            break
    assert has_started
    wait_until(lambda: not [line for line in Path("/proc").glob("[0-9]*/cmdline") if mark.encode() in read(line)])
    assert str(tmp_path) not in Path("/proc/mounts").read_text()


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):  # the process has ended
        return b""


def test_version_is_parsed(nix: Nix) -> None:
    assert nix.version >= (2, 3)


@pytest.mark.nix
def test_closure_has_every_shape(closure: Closure) -> None:
    server, paths = closure.server, closure.paths
    tree = server.real_path(paths["tree-1.0"])
    references = server.run("nix-store", "--query", "--references", paths["tree-1.0"]).lines
    assert set(references) == {paths["tree-1.0"], paths["dep-1.0"]}
    assert (tree / "relative").readlink() == Path("bin/tree")
    assert (tree / "absolute").readlink() == Path(paths["dep-1.0"], "bin/dep")
    assert not (tree / "dangling").exists()
    assert (tree / "dangling").is_symlink()
    assert (tree / "empty").stat().st_size == 0
    assert not any((tree / "empty-dir").iterdir())
    assert len(list((tree / "deep").rglob("bottom"))) == 1
    assert max(len(entry.name) for entry in (tree / "names").iterdir()) == 255
    assert server.real_path(paths["empty-file-1.0"]).stat().st_size == 0
    assert server.real_path(paths["program-1.0"]).stat().st_mode & 0o777 == 0o555
    assert server.real_path(paths["link-1.0"]).is_symlink()
    in_top = set(server.run("nix-store", "--query", "--requisites", closure.top).lines)
    assert set(paths) - {path[44:] for path in in_top} == {"added-1.0", "flat-1.0", "floating-1.0"}

"""`harmonia warm` fills the cache as the server would, and evicts nothing."""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from harmonia.cache.warmer import Warmer
from harmonia.config.loader import parse
from harmonia.store.store import Store
from harmonia.tools.fixture_tree import Sparse
from harmonia.tools.store_builder import StoreBuilder
from support.programs import needs_root
from support.running import HARMONIA, Server, nar_url, run, unpacked

Start = Callable[..., Server]

NOBODY = 65534


@pytest.fixture
def store(tmp_path: Path) -> StoreBuilder:
    return StoreBuilder(tmp_path / "store")


def metrics(server: Server) -> dict[str, float]:
    lines = (line.rpartition(" ") for line in server.get("/metrics").text.splitlines() if line[0] != "#")
    return {name: float(value) for name, _, value in lines}


def config(store: StoreBuilder, tmp_path: Path, settings: str = "") -> str:
    file = tmp_path / "warm.toml"
    file.write_text(
        f"real_nix_store = '{store.real_dir}'\nnix_db_path = '{store.db_path}'\ncache_dir = '{tmp_path}/cache'\n"
        f"{settings}\n"
    )
    return str(file)


def counts(stderr: str) -> list[int]:
    """Return the counts of compressed, already cached, too large, and failed NARs."""
    match = re.search(r"(\d+) compressed in [\d.]+ s, (\d+) already cached, (\d+) did not fit, (\d+) failed", stderr)
    assert match, stderr
    return [int(count) for count in match.groups()]


def test_progress_is_reported_within_a_large_nar(store: StoreBuilder, tmp_path: Path) -> None:
    info = store.add(store.output_path("large"), Sparse(40 << 20))
    settings = parse(Path(config(store, tmp_path)).read_text(), "warm.toml", {})
    progress: list[int] = []
    warmer = Warmer(settings, Store.of(settings))
    for states in (["compressed"], ["there"]):
        progress.clear()
        assert [each.state for each in warmer.warm([info.path], progress.append)] == states
        assert sum(progress) == info.nar_size
        assert (max(progress) < info.nar_size / 2) == (states == ["compressed"])


def test_warmed_nars_are_hits_for_the_running_server(store: StoreBuilder, start: Start, tmp_path: Path) -> None:
    dep = store.add_text("dep", b"dep" * 10_000)
    large = store.add(store.output_path("large"), os.urandom(1000) * 20_000, references=[dep.path])
    server = start(store=tmp_path / "store")
    answer = run("--config", str(server.config), "warm", f"/nix/store/{large.path}")
    assert answer.returncode == 0, answer.stderr
    assert counts(answer.stderr) == [2, 0, 0, 0]
    assert answer.stderr.startswith(f"Filling the cache in {server.cache_dir}\n")
    for info in (dep, large):
        assert b"FileSize: " in server.get(f"/{info.path.hash_part}.narinfo").body
        assert len(unpacked(server.get(nar_url(info) + ".zst").body)) == info.nar_size
    found = metrics(server)
    assert found["harmonia_cache_hits_total"] == 2
    assert (found["harmonia_cache_misses_total"], found["harmonia_cache_fills_total"]) == (0, 0)
    assert counts(run("--config", str(server.config), "warm", f"/nix/store/{large.path}").stderr) == [0, 2, 0, 0]


def test_closure_is_warmed_by_default(store: StoreBuilder, tmp_path: Path) -> None:
    dep = store.add_text("dep", b"dep")
    top = store.add_text("top", b"", [dep.path])
    settings = config(store, tmp_path)
    assert counts(run("--config", settings, "warm", "--no-closure", top.path).stderr) == [1, 0, 0, 0]
    assert counts(run("--config", settings, "warm", top.path).stderr) == [1, 1, 0, 0]


def test_gc_roots_are_warmed(store: StoreBuilder, tmp_path: Path) -> None:
    dep = store.add_text("dep", b"dep")
    top = store.add_text("top", b"", [dep.path])
    store.add_text("garbage", b"")
    roots = tmp_path / "store/nix/var/nix/gcroots"
    roots.mkdir()
    (roots / "top").symlink_to(f"/nix/store/{top.path}")
    (roots / "loop").symlink_to("loop")
    answer = run("--config", config(store, tmp_path), "warm", "--gc-roots")
    assert counts(answer.stderr) == [2, 0, 0, 0]
    assert f"GC roots: cannot follow '{roots}/loop': too many symlinks" in answer.stderr


def test_full_cache_evicts_nothing(store: StoreBuilder, tmp_path: Path) -> None:
    infos = [store.add(store.output_path(f"noise-{number}"), os.urandom(400_000)) for number in range(4)]
    answer = run("--config", config(store, tmp_path, "cache_size = '1M'"), "warm", *(info.path for info in infos))
    assert answer.returncode == 1
    assert counts(answer.stderr) == [2, 0, 2, 0]
    assert "raise cache_size" in answer.stderr
    kept = list((tmp_path / "cache/nar").iterdir())
    assert len(kept) == 2
    again = run("--config", config(store, tmp_path, "cache_size = '1M'"), "warm", *(info.path for info in infos))
    assert counts(again.stderr) == [0, 2, 2, 0]
    assert list((tmp_path / "cache/nar").iterdir()) == kept


def test_path_that_cannot_be_compressed_is_reported_and_the_rest_is_warmed(store: StoreBuilder, tmp_path: Path) -> None:
    bad, good = store.add_text("bad", b"bad"), store.add_text("good", b"good")
    file = Path(os.fsdecode(store.real_path(bad.path)))
    file.chmod(0o644)
    file.write_text("changed")
    answer = run("--config", config(store, tmp_path), "warm", bad.path, good.path)
    assert answer.returncode == 1
    assert f"failed: /nix/store/{bad.path}" in answer.stderr
    assert counts(answer.stderr) == [1, 0, 0, 1]


def test_unreadable_path_is_reported_with_the_cause(store: StoreBuilder, tmp_path: Path) -> None:
    info = store.add(store.output_path("gone"), b"")
    os.unlink(store.real_path(info.path))
    answer = run("--config", config(store, tmp_path), "warm", info.path)
    cause = f"{store.real_dir}/{info.path}: No such file or directory"
    assert answer.stderr.splitlines()[1:-1] == [f"failed: /nix/store/{info.path}: {cause}"]
    assert counts(answer.stderr) == [0, 0, 0, 1]


def test_quiet_prints_nothing_if_all_is_compressed(store: StoreBuilder, tmp_path: Path) -> None:
    answer = run("--config", config(store, tmp_path), "warm", "--quiet", store.add_text("text", b"").path)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")


def test_server_without_compression_needs_no_warming(store: StoreBuilder, tmp_path: Path) -> None:
    settings = config(store, tmp_path, "enable_compression = false")
    answer = run("--config", settings, "warm", store.add_text("text", b"").path)
    assert answer.returncode == 2
    assert answer.stderr == "harmonia: enable_compression is false: this server has no cache of compressed NARs\n"


def test_relative_cache_dir_is_below_the_current_directory(
    store: StoreBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(config(store, tmp_path))
    file.write_text(file.read_text().replace(f"{tmp_path}/cache", "cache/below"))
    monkeypatch.chdir(tmp_path)
    assert counts(run("--config", str(file), "warm", store.add_text("text", b"").path).stderr) == [1, 0, 0, 0]
    assert list((tmp_path / "cache/below/nar").iterdir())


def test_warm_has_idle_priority(store: StoreBuilder, tmp_path: Path) -> None:
    """The idle policy for CPUs implies the idle class for disks."""
    path = store.add_text("text", b"").path
    program = (
        "import atexit, os, sys\n"
        "atexit.register(lambda: print(os.sched_getscheduler(0) == os.SCHED_IDLE))\n"
        "from harmonia.cli import main\nmain(prog_name='harmonia')"
    )
    command = [HARMONIA[0], "-c", program, "--config", config(store, tmp_path), "warm", path]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "True\n"


@pytest.mark.root
@needs_root
def test_root_fills_the_cache_as_the_user_of_the_server() -> None:
    with tempfile.TemporaryDirectory() as directory:  # accessible to other users
        tmp_path = Path(directory)
        tmp_path.chmod(0o755)
        store = StoreBuilder(tmp_path / "store")
        path = store.add_text("text", b"").path
        # As systemd creates it for DynamicUser=: only root can enter it.
        (tmp_path / "private").mkdir(mode=0o700)
        (tmp_path / "private/cache").mkdir()
        os.chown(tmp_path / "private/cache", NOBODY, NOBODY)
        (tmp_path / "cache").symlink_to("private/cache")
        answer = run("--config", config(store, tmp_path), "warm", path)
        assert answer.returncode == 0, answer.stderr
        [file] = (tmp_path / "cache/nar").iterdir()
        assert file.stat().st_uid == NOBODY

"""`harmonia mirror` writes closures to a bucket, each completely and only once, whatever ends it."""

import asyncio
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harmonia.config.loader import parse
from harmonia.mirror.connection import open_bucket
from harmonia.mirror.target import BucketTarget
from harmonia.nix import base32, narinfo
from harmonia.nix.narinfo import NarFile
from harmonia.store.store import Store
from harmonia.tools.store_builder import StoreBuilder
from support import debug_info, preloaded, realisations
from support.faulty_network import FaultyNetwork, refusal
from support.mirrors import KEY, chain, configure, mirror
from support.running import HARMONIA, PATIENCE_S, Server, file_url, run, unpacked, wait_until
from support.s3_service import Folder

pytestmark = pytest.mark.s3

Start = Callable[..., Server]
MEBIBYTE = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> StoreBuilder:
    return StoreBuilder(tmp_path / "store")


def test_closure_is_written_in_the_layout_of_a_binary_cache(
    store: StoreBuilder, folder: Folder, tmp_path: Path, start: Start
) -> None:
    infos = chain(store, 3)
    config = configure(store, tmp_path, folder.settings())
    top = infos[-1].path
    assert "3 written to" in mirror(config, f"/nix/store/{top}")
    assert folder.get("nix-cache-info") == b"StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 30\n"
    paths = folder.paths()
    assert paths.keys() == {info.path.hash_part for info in infos}
    server = start(store=tmp_path / "store")
    for info in infos:
        found, nar = paths[info.path.hash_part]
        assert (found.nar_hash, found.nar_size, found.references) == (info.nar_hash, info.nar_size, info.references)
        assert any(KEY.public_key.verify(found.fingerprint("/nix/store"), s) for s in found.sigs)
        content = folder.get(nar.url)
        assert (hashlib.sha256(content).digest(), len(content)) == (nar.file_hash, nar.file_size)
        assert hashlib.sha256(unpacked(content)).digest() == info.nar_hash
        assert nar.url == f"nar/{base32.encode(hashlib.sha256(content).digest())}.nar.zst"
        assert content == server.get(file_url(info)).body
        assert folder.get(f"{info.path.hash_part}.ls") == server.get(f"/{info.path.hash_part}.ls").body


def test_logs_realisations_and_debug_info_are_written(store: StoreBuilder, folder: Folder, tmp_path: Path) -> None:
    realisations.create(store, realisations.REALISATIONS)
    realisations.create(store, realisations.BUILD_TRACE)
    derivation = store.output_path("built.drv")
    store.add_log(derivation, b"compiled\n")
    info = store.add(store.output_path("built"), debug_info.tree(debug_info.ONE), deriver=derivation)
    realisations.register(store, realisations.HASH, "out", info.path)
    realisations.trace(store, derivation, "out", info.path)
    config = configure(store, tmp_path, folder.settings())
    mirror(config, info.path)
    assert folder.get(f"log/{derivation}") == b"compiled\n"
    link = json.loads(folder.get(f"debuginfo/{debug_info.ONE}.debug"))
    assert link["archive"].removeprefix("../") in folder.objects()
    assert json.loads(folder.get(f"realisations/{realisations.HASH}!out.doi"))["outPath"] == info.path
    assert json.loads(folder.get(f"build-trace-v2/{derivation}/out.doi"))["outPath"] == info.path


def test_realisations_are_read_outside_the_event_loop(
    store: StoreBuilder, folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database may wait for its disk, while other NARs are sent."""
    info = store.add_text("a", b"a")
    settings = parse(Path(configure(store, tmp_path, folder.settings())).read_text(), "", {})
    threads: list[threading.Thread] = []

    def realisation_ids(*_: object) -> list[tuple[str, str]]:
        threads.append(threading.current_thread())
        return []

    monkeypatch.setattr(Store, "realisation_ids", realisation_ids)

    async def write() -> None:
        target = BucketTarget(settings, open_bucket(settings))
        await target.put_narinfo(info.path, narinfo.render(info, "/nix/store", NarFile("nar/a.nar"), []))
        await target.close()
        assert threads
        assert threading.current_thread() not in threads

    asyncio.run(write())


def test_second_run_only_marks_the_named_path(store: StoreBuilder, folder: Folder, tmp_path: Path) -> None:
    top = chain(store, 5)[-1].path
    config = configure(store, tmp_path, folder.settings())
    mirror(config, top)
    before = folder.objects()
    assert "0 written to" in mirror(config, top)
    assert folder.objects() == before | {f"harmonia/roots/{top}": 0}


def test_two_writers_at_once_make_one_object_of_each(store: StoreBuilder, folder: Folder, tmp_path: Path) -> None:
    top = chain(store, 20)[-1].path
    configs = [configure(store, tmp_path, folder.settings(), cache) for cache in ("one", "two")]
    writers = [
        preloaded.popen([*HARMONIA, "--config", each, "mirror", top], env=dict(os.environ), stderr=subprocess.PIPE)
        for each in configs
    ]
    for writer in writers:
        stderr = writer.communicate(timeout=PATIENCE_S)[1]
        assert writer.returncode == 0, stderr
    objects = folder.objects()
    assert len([key for key in objects if key.startswith("nar/")]) == 20
    assert len([key for key in objects if key.endswith(".narinfo")]) == 20
    folder.check_closed()


def test_large_nar_is_written_in_parts(store: StoreBuilder, folder: Folder, tmp_path: Path) -> None:
    info = store.add(store.output_path("large"), random.Random(1).randbytes(20 * MEBIBYTE))
    mirror(configure(store, tmp_path, folder.settings()), info.path)
    folder.check_closed()
    ((_, nar),) = folder.paths().values()
    assert hashlib.sha256(folder.get(nar.url)).digest() == nar.file_hash


def test_damaged_path_and_its_referrers_are_not_written(store: StoreBuilder, folder: Folder, tmp_path: Path) -> None:
    infos = chain(store, 4)
    real = Path(os.fsdecode(store.real_path(infos[1].path)))
    real.chmod(0o644)
    real.write_bytes(bytes(2000))
    config = configure(store, tmp_path, folder.settings())
    answer = run("--config", config, "mirror", infos[-1].path)
    assert answer.returncode == 1
    assert "1 written" in answer.stderr
    assert "3 failed" in answer.stderr
    assert f"failed: /nix/store/{infos[1].path}: " in answer.stderr
    assert folder.paths().keys() == {infos[0].path.hash_part}


def test_killed_writer_leaves_whole_closures_and_continues(store: StoreBuilder, folder: Folder, tmp_path: Path) -> None:
    top = chain(store, 60)[-1].path
    config = configure(store, tmp_path, folder.settings())
    moments = random.Random(23)
    for _ in range(5):
        writer = preloaded.popen([*HARMONIA, "--config", config, "mirror", "-q", top], env=dict(os.environ))
        time.sleep(moments.uniform(0.1, 0.6))
        writer.send_signal(signal.SIGKILL)
        writer.wait(PATIENCE_S)
        folder.check_closed()
    mirror(config, top)
    folder.check_closed()
    assert len(folder.paths()) == 60


def test_bucket_of_another_store_directory_is_refused(store: StoreBuilder, folder: Folder, tmp_path: Path) -> None:
    folder.put("nix-cache-info", b"StoreDir: /gnu/store\n")
    top = chain(store, 1)[-1].path
    answer = run("--config", configure(store, tmp_path, folder.settings()), "mirror", top)
    assert answer.returncode == 1
    assert "a cache of /gnu/store, not of /nix/store" in answer.stderr
    assert folder.paths() == {}


def test_path_that_may_not_be_served_is_refused(store: StoreBuilder, folder: Folder, tmp_path: Path) -> None:
    infos = chain(store, 2)
    config = configure(store, tmp_path, "[publish]\ndeny = ['p0']\n" + folder.settings("read = false"))
    answer = run("--config", config, "mirror", infos[1].path)
    assert answer.returncode == 1
    assert f"/nix/store/{infos[0].path} may not be served" in answer.stderr
    assert folder.objects() == {}


@pytest.mark.parametrize(
    ("who", "expected"),
    [("wrong", "status 403 (SignatureDoesNotMatch); check the secret"), ("reader", "status 403 (AccessDenied); give")],
)
def test_refused_access_key_is_one_line_without_the_secret(
    store: StoreBuilder, folder: Folder, tmp_path: Path, *, who: str, expected: str
) -> None:
    top = chain(store, 1)[-1].path
    answer = run("--config", configure(store, tmp_path, folder.settings(who=who)), "mirror", top)
    assert answer.returncode == 1
    assert expected in answer.stderr
    assert answer.stderr.count("\n") == 1
    assert "s3cr3t" not in answer.stderr


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (refusal(404, "NoSuchBucket"), "status 404 (NoSuchBucket); create the bucket"),
        (refusal(400, "AuthorizationHeaderMalformed"), "(AuthorizationHeaderMalformed); set mirror.region"),
        (refusal(301, "PermanentRedirect"), "redirects to another region; set mirror.region"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello", "not an answer of an S3 service"),
    ],
    ids=["no bucket", "wrong region", "redirect", "no S3"],
)
def test_wrong_bucket_is_one_line_with_the_remedy(
    store: StoreBuilder, folder: Folder, tmp_path: Path, *, answer: bytes, expected: str
) -> None:
    top = chain(store, 1)[-1].path
    with FaultyNetwork(int(folder.endpoint.rpartition(":")[2])) as network:
        network.answer, folder.endpoint = answer, network.url
        config = configure(store, tmp_path, folder.settings())
        for command in ([str(top)], ["gc", "--keep", "1d"], ["verify"]):
            ended = run("--config", config, "mirror", *command)
            assert ended.returncode == 1
            assert ended.stderr.count("\n") == 1, ended.stderr
            assert expected in ended.stderr or (command[0] != str(top) and b"200 OK" in answer), ended.stderr


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("bucket = 'cache'", "mirror.bucket: set without endpoint; set both or none"),
        ("endpoint = 'http://x'", "mirror.endpoint: set without bucket; set both or none"),
        ("endpoint = 'http://x'\nbucket = 'A'", "mirror.bucket: expected 3 to 63"),
        ("prefix = '/a'", "mirror.prefix: expected a folder"),
        ("", "mirror.bucket: not set; name the bucket"),
        (
            "endpoint = 'http://x'\nbucket = 'abc'\ncredentials_file = '/nonexistent'",
            "mirror.credentials_file: cannot read '/nonexistent'",
        ),
    ],
)
def test_wrong_settings_are_one_line(store: StoreBuilder, tmp_path: Path, *, settings: str, expected: str) -> None:
    config = configure(store, tmp_path, f"[mirror]\n{settings}")
    answer = run("--config", config, "mirror", chain(store, 1)[-1].path)
    assert answer.returncode == 2, answer.stderr
    assert expected in answer.stderr
    assert answer.stderr.count("\n") == 1


def test_malformed_credentials_are_not_shown(store: StoreBuilder, folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "writer.s3").write_text("s3cr3t\n")
    answer = run("--config", configure(store, tmp_path, folder.settings()), "mirror", chain(store, 1)[-1].path)
    assert answer.returncode == 2
    assert "expected ACCESS_KEY_ID:SECRET_ACCESS_KEY" in answer.stderr
    assert "s3cr3t" not in answer.stderr


def test_missing_obstore_is_one_line_with_the_remedy(store: StoreBuilder, folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "without").mkdir()
    (tmp_path / "without/obstore.py").write_text("raise ModuleNotFoundError(name='obstore')\n")
    config = configure(store, tmp_path, folder.settings())
    command = [*preloaded.NOT_PRELOADED, "--config", config, "mirror", chain(store, 1)[-1].path]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "without")}
    answer = subprocess.run(command, check=False, env=environment, stderr=subprocess.PIPE, text=True)
    assert answer.returncode == 2
    assert "mirror.bucket: needs the Python package obstore; install harmonia[s3]" in answer.stderr
    assert answer.stderr.count("\n") == 1


def test_interpreter_is_not_finalized_beside_threads_of_obstore(
    store: StoreBuilder, folder: Folder, tmp_path: Path
) -> None:
    """One of these threads may abort the process then, after the command has succeeded."""
    config = configure(store, tmp_path, folder.settings())
    program = "import atexit; atexit.register(print, 'finalized'); from harmonia.cli import main; main()"
    path = str(chain(store, 1)[0].path)
    for arguments, status in ((["-q", path], 0), (["verify"], 0), (["-q", "none"], 1)):
        command = [sys.executable, "-c", program, "--config", config, "mirror", *arguments]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (answer.returncode, answer.stdout) == (status, ""), answer.stderr


def test_watch_writes_new_paths_to_the_bucket(store: StoreBuilder, folder: Folder, tmp_path: Path) -> None:
    store.add_text("old", b"old")
    watch = f"[watch]\nurl = 'mirror'\nstate_dir = '{tmp_path}/state'\n"
    command = [*HARMONIA, "--config", configure(store, tmp_path, watch + folder.settings()), "watch"]
    for number, arguments in enumerate(([], ["mirror"])):
        with preloaded.popen(
            [*command, *arguments], env=dict(os.environ), stderr=subprocess.PIPE, text=True
        ) as watcher:
            assert watcher.stderr is not None
            next(line for line in watcher.stderr if "uploading new paths" in line)
            dep = store.add_text(f"dep-{number}", b"dep")
            top = store.add_text(f"top-{number}", b"top", [dep.path])
            wait_until(lambda top=top: top.path.hash_part in folder.paths())  # type: ignore[misc]
            watcher.kill()
    folder.check_closed()
    assert len(folder.paths()) == 4

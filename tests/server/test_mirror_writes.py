"""Closures of served paths are written to the bucket (`mirror.write_served`), and serving never waits for that."""

import random
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from harmonia.nix.path_info import PathInfo
from harmonia.nix.store_path import StorePath
from harmonia.tools.store_builder import StoreBuilder
from harmonia.upload.queue import UploadQueue
from support.faulty_network import SLOW_DOWN, FaultyNetwork, refusal
from support.mirrors import chain, configure, mirror
from support.running import Server, file_url, patched, run, wait_until
from support.s3_service import S3, Folder

pytestmark = pytest.mark.s3

Start = Callable[..., Server]


@pytest.fixture
def store(tmp_path: Path) -> StoreBuilder:
    return StoreBuilder(tmp_path / "own")


@pytest.fixture
def network(s3_service: S3) -> Iterator[FaultyNetwork]:
    with FaultyNetwork(int(s3_service.url.rpartition(":")[2])) as network:
        yield network


@pytest.fixture
def serve(start: Start, tmp_path: Path, folder: Folder) -> Callable[[], Server]:
    def serve() -> Server:
        settings = folder.settings("read = false\nwrite_served = true")
        server = start(store=tmp_path / "own", settings=settings)
        wait_until(lambda: writes(server).startswith("up"))
        return server

    return serve


def writes(server: Server) -> str:
    """Return the state of the writes."""
    lines = server.get("/health?verbose").text.splitlines()
    return next(line.removeprefix("mirror writes: ") for line in lines if line.startswith("mirror writes: "))


def metric(server: Server, name: str) -> float:
    (value,) = re.findall(rf"^harmonia_mirror_{name} (\S+)$", server.get("/metrics").text, re.MULTILINE)
    return float(value)


def download(server: Server, info: PathInfo) -> None:
    assert server.get(file_url(info)).status == 200


def test_closure_of_a_downloaded_path_is_written(
    store: StoreBuilder, serve: Callable[[], Server], folder: Folder
) -> None:
    infos = chain(store, 3)
    other = store.add_text("other", b"other")
    server = serve()
    server.get(f"/{other.path.hash_part}.narinfo")
    for _ in range(3):
        download(server, infos[-1])
    wait_until(lambda: metric(server, "written_paths_total") == 1)
    assert folder.paths().keys() == {info.path.hash_part for info in infos}
    folder.check_closed()
    wait_until(lambda: writes(server) == "up, 0 paths queued, 0 of them failing")
    assert metric(server, "queued_paths") == metric(server, "failures_total") == 0
    assert metric(server, "write_up") == 1
    assert metric(server, "written_bytes_total") > 3 * 2000


@pytest.mark.usefixtures("store")
def test_all_digits_of_a_long_queue_are_shown(start: Start, folder: Folder, tmp_path: Path) -> None:
    settings = folder.settings("read = false\nwrite_served = true")
    count = "from harmonia.upload import queue; queue._STATISTICS = 'select 1234567, 1234567, null'"
    server = start(store=tmp_path / "own", settings=settings, program=patched(count))
    wait_until(lambda: writes(server) == "up, 1234567 paths queued, 1234567 of them failing")


def test_download_of_a_path_in_the_bucket_keeps_it_there(
    store: StoreBuilder, serve: Callable[[], Server], folder: Folder, tmp_path: Path
) -> None:
    info = store.add_text("old", b"old")
    mirror(configure(store, tmp_path, folder.settings()), info.path)
    assert f"harmonia/roots/{info.path}" not in folder.objects()
    download(serve(), info)
    wait_until(lambda: f"harmonia/roots/{info.path}" in folder.objects())


def down(network: FaultyNetwork) -> None:
    network.down = True


def slow(network: FaultyNetwork) -> None:
    network.delay = 10.0


def answering(answer: bytes) -> Callable[[FaultyNetwork], None]:
    return lambda network: setattr(network, "answer", answer)


@pytest.mark.parametrize(
    ("break_", "state", "logged"),
    [
        pytest.param(down, "down", "does not answer", id="down"),
        pytest.param(slow, "up", None, id="10 s of latency", marks=pytest.mark.slow),
        pytest.param(answering(SLOW_DOWN), "down", r"status 503 \(SlowDown\)", id="throttled"),
        pytest.param(answering(refusal(403, "AccessDenied")), "down", "give the access key permission", id="denied"),
        pytest.param(answering(refusal(403, "RequestTimeTooSkewed")), "down", "machine's clock", id="wrong clock"),
        pytest.param(answering(refusal(404, "NoSuchBucket")), "down", "create the bucket", id="no bucket"),
        pytest.param(answering(refusal(507, "QuotaExceeded")), "down", "the bucket is full", id="full"),
    ],
)
def test_faulty_bucket_delays_no_client_and_its_paths_wait(
    store: StoreBuilder,
    serve: Callable[[], Server],
    folder: Folder,
    network: FaultyNetwork,
    *,
    break_: Callable[[FaultyNetwork], None],
    state: str,
    logged: str | None,
) -> None:
    folder.endpoint = network.url
    infos = [store.add_text(name, name.encode()) for name in ("one", "two", "three")]
    server = serve()
    break_(network)
    for info in infos:
        download(server, info)
    wait_until(lambda: re.fullmatch(rf"{state}, 3 paths queued, \d of them failing", writes(server)))
    assert server.get("/health").status == 200
    assert metric(server, "queued_paths") == 3
    assert metric(server, "write_up") == (state == "up")
    assert metric(server, "oldest_seconds") > 0
    if logged is not None:
        server.wait_for_log(logged)
    download(server, infos[0])
    assert folder.paths() == {}
    network.down, network.delay, network.answer = False, 0.0, None
    wait_until(lambda: writes(server).startswith("up, 0 paths queued"))
    assert len(folder.paths()) == 3
    folder.check_closed()


def test_path_that_the_full_bucket_refuses_waits_longer_each_time(
    store: StoreBuilder, serve: Callable[[], Server], folder: Folder, network: FaultyNetwork
) -> None:
    """Small objects may fit into a bucket that is full for a NAR, so the bucket itself is not down."""
    folder.endpoint = network.url
    large = store.add(store.output_path("large"), random.Random(7).randbytes(200_000))
    small = store.add_text("small", b"small")
    server = serve()
    network.refused_above = 100_000, refusal(507, "QuotaExceeded")
    download(server, large)
    download(server, small)
    wait_until(lambda: folder.paths().keys() == {small.path.hash_part})  # the state is that of a second ago, at most
    wait_until(lambda: writes(server) == "up, 1 paths queued, 1 of them failing")
    assert folder.paths().keys() == {small.path.hash_part}
    server.wait_for_log(f"cannot upload {large.path}: .*the bucket is full.*; trying again in")
    assert metric(server, "failures_total") >= 1
    network.refused_above = None
    wait_until(lambda: len(folder.paths()) == 2)


def test_queued_paths_survive_kill_9(
    store: StoreBuilder, serve: Callable[[], Server], folder: Folder, network: FaultyNetwork
) -> None:
    folder.endpoint = network.url
    top = chain(store, 2)[-1]
    server = serve()
    network.down = True
    download(server, top)
    wait_until(lambda: metric(server, "queued_paths") == 1)
    server.stop(signal.SIGKILL)
    network.down = False
    server.log.clear()
    server.start()
    wait_until(lambda: len(folder.paths()) == 2)
    folder.check_closed()


def test_queue_of_another_server_is_an_error_that_names_the_setting(
    start: Start, store: StoreBuilder, folder: Folder, tmp_path: Path
) -> None:
    info = store.add_text("a", b"a")
    (tmp_path / "shared" / "mirror").mkdir(parents=True)
    queue = UploadQueue(str(tmp_path / "shared" / "mirror" / "queue.sqlite"))
    with closing(queue):
        settings = folder.settings("read = false\nwrite_served = true")
        server = start(store=tmp_path / "own", settings=settings, cache_dir=tmp_path / "shared")
        server.wait_for_log("another process uses the queue .*; stop that process, or set another cache_dir")
        download(server, info)


def test_queue_that_is_damaged_is_reported_and_opened_again(
    start: Start, store: StoreBuilder, folder: Folder, network: FaultyNetwork, tmp_path: Path
) -> None:
    file = tmp_path / "cache" / "mirror" / "queue.sqlite"
    file.parent.mkdir(parents=True)
    with closing(UploadQueue(str(file))) as queue:
        queue.add(StorePath(f"{number:032}-path") for number in range(100_000))  # more than SQLite has in memory
    network.down = True
    folder.endpoint = network.url
    server = start(
        store=tmp_path / "own",
        settings=folder.settings("read = false\nwrite_served = true"),
        cache_dir=tmp_path / "cache",
        program=patched("from harmonia.server import mirror_writer; mirror_writer._RETRY_S = 0.1"),
    )
    wait_until(lambda: writes(server).startswith("down, 100000 paths"))
    file.write_bytes(b"damaged " * (file.stat().st_size // 8))
    server.wait_for_log("ERROR cannot write served paths to the bucket: cannot use the queue .*; trying again")
    # The damaged file is last: otherwise, a new one could be opened with the journal of the old one.
    for each in sorted(file.parent.glob("queue.sqlite*"), reverse=True):
        each.unlink(missing_ok=True)  # the server tries again meanwhile, and removes its journal
    network.down = False
    info = store.add_text("a", b"a")
    download(server, info)
    wait_until(lambda: info.path.hash_part in folder.paths())
    assert not [line for line in server.log if "Traceback" in line or "ended" in line], server.log


def test_queue_that_cannot_be_used_is_shown_as_down(start: Start, folder: Folder, tmp_path: Path) -> None:
    StoreBuilder(tmp_path / "own")
    server = start(
        store=tmp_path / "own",
        settings=folder.settings("read = false\nwrite_served = true"),
        program=patched(
            "import os, sys\n"
            "from harmonia.errors import ConfigError\n"
            "from harmonia.upload.queue import UploadQueue\n"
            "read = UploadQueue.statistics\n"
            "def statistics(self):\n"
            "    if os.path.exists(os.path.join(os.path.dirname(sys.argv[-1]), 'broken')):\n"
            "        raise ConfigError('the disk is broken')\n"
            "    return read(self)\n"
            "UploadQueue.statistics = statistics\n"
        ),
    )
    wait_until(lambda: writes(server).startswith("up"))
    (server.directory / "broken").touch()
    wait_until(lambda: writes(server).startswith("down"))
    assert metric(server, "write_up") == 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("[mirror]\nwrite_served = true", "mirror.write_served: set without bucket; set both or none"),
        (
            "[publish]\nallow = ['a*']\n[mirror]\nendpoint = 'http://x'\nbucket = 'abc'\nread = false\n"
            "write_served = true",
            "publish: publish rules do not apply to the bucket of [mirror]; remove them",
        ),
        (
            "local_store = false\n[mirror]\nendpoint = 'http://x'\nbucket = 'abc'\nwrite_served = true",
            "mirror.write_served: set together with local_store = false; remove one of them",
        ),
    ],
)
def test_wrong_settings_are_one_line(tmp_path: Path, settings: str, expected: str) -> None:
    config = tmp_path / "harmonia.toml"
    config.write_text(f"cache_dir = '{tmp_path}/cache'\n{settings}\n")
    answer = run("--config", str(config), "check-config")
    assert answer.returncode == 2
    assert expected in answer.stderr
    assert answer.stderr.count("\n") == 1

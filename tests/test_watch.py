"""`harmonia watch`: each new path of the store reaches the target, whatever happens meanwhile."""

import asyncio
import os
import random
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from harmonia.config.settings import Settings
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey
from harmonia.store.store import Store
from harmonia.tools.store_builder import StoreBuilder
from harmonia.upload.http_target import HttpTarget
from harmonia.upload.nar_files import NarFiles
from harmonia.upload.queue import UploadQueue
from harmonia.upload.queue_uploader import QueueUploader
from harmonia.upload.uploader import Uploader
from support import preloaded
from support.pages import ROOT
from support.put_server import PutServer, put_server
from support.running import PATIENCE_S, ServiceManager, peak_bytes, run, wait_until
from support.small_disk import mounted


@pytest.fixture
def store(tmp_path: Path) -> StoreBuilder:
    return StoreBuilder(tmp_path / "store")


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[PutServer]:
    with put_server(tmp_path / "target", bulk=True) as server:
        yield server


class Watch:
    """The process of a watcher."""

    def __init__(self, directory: Path, store: StoreBuilder, cache: PutServer) -> None:
        self.directory = directory
        self.state = directory / "state"
        self.store = store
        self.cache = cache
        self.settings = ""
        self.environment: dict[str, str] = {}
        self.log: Path = directory / "watch.log"
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        config = self.directory / "watch.toml"
        config.write_text(
            f"real_nix_store = '{self.store.real_dir}'\nnix_db_path = '{self.store.db_path}'\n"
            f"cache_dir = '{self.directory}/cache'\nlog_level = 'debug'\n"
            f"[watch]\nurl = '{self.cache.url}'\nstate_dir = '{self.state}'\n{self.settings}\n"
        )
        before = self.text().count("uploading new paths")
        with self.log.open("a") as log:
            process = self.process = preloaded.popen(
                [*preloaded.HARMONIA, "--config", str(config), "watch"],
                env={**os.environ, **self.environment},
                stderr=log,
                text=True,
            )
        wait_until(lambda: self.text().count("uploading new paths") > before or process.poll() is not None)
        assert process.poll() is None, self.text()

    def record_statistics(self) -> None:
        """Let the next process write its metrics often, for `statistics`."""
        (self.directory / "run").mkdir()
        self.environment |= {"RUNTIME_DIRECTORY": str(self.directory / "run"), "WATCHDOG_USEC": "500000"}

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process is None:
            return 0
        self.process.send_signal(number)
        try:
            return self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()
            self.process = None

    def wait_for(self, *infos: PathInfo) -> None:
        """Wait until the target has the paths, and their closures."""
        wait_until(lambda: all((self.cache.directory / f"{info.path.hash_part}.narinfo").exists() for info in infos))
        self.cache.names()

    def wait_for_log(self, pattern: str) -> None:
        wait_until(lambda: re.search(pattern, self.text()))


@pytest.fixture
def watch(tmp_path: Path, store: StoreBuilder, cache: PutServer) -> Iterator[Watch]:
    watch = Watch(tmp_path, store, cache)
    yield watch
    watch.stop(signal.SIGKILL)
    assert "Traceback" not in watch.text()


def add(store: StoreBuilder, name: str, content: bytes = b"", references: tuple[PathInfo, ...] = ()) -> PathInfo:
    paths = [info.path for info in references]
    return store.add(store.output_path(name), content or name.encode(), references=paths)


class TestNewPaths:
    def test_new_path_is_uploaded_with_its_closure(self, store: StoreBuilder, cache: PutServer, watch: Watch) -> None:
        before = add(store, "before")
        unrelated = add(store, "unrelated")
        watch.start()
        new = add(store, "new", references=(before,))
        watch.wait_for(new)
        assert cache.names() == {before.path, new.path}
        assert not (cache.directory / f"{unrelated.path.hash_part}.narinfo").exists()

    def test_path_is_uploaded_within_two_seconds(self, store: StoreBuilder, watch: Watch) -> None:
        """On an idle machine it takes some 30 ms; a poll of the database takes up to a second."""
        watch.start()
        add(store, "first")
        watch.wait_for()
        began = time.monotonic()
        watch.wait_for(add(store, "new", os.urandom(100_000)))
        assert time.monotonic() - began < PATIENCE_S

    def test_paths_of_the_time_without_a_watcher_are_uploaded(self, store: StoreBuilder, watch: Watch) -> None:
        watch.start()
        assert watch.stop() == 0
        missed = [add(store, f"missed-{number}") for number in range(3)]
        watch.start()
        watch.wait_for(*missed)

    def test_derivations_are_not_uploaded_by_themselves(
        self, store: StoreBuilder, cache: PutServer, watch: Watch
    ) -> None:
        watch.start()
        store.add_derivation("drv", "/bin/sh")
        watch.wait_for(add(store, "out"))
        assert len(cache.names()) == 1

    def test_large_path_delays_no_small_one(self, store: StoreBuilder, cache: PutServer, watch: Watch) -> None:
        watch.start()
        asked, released = threading.Event(), threading.Event()

        def fault(method: str, path: str) -> None:
            if method == "HEAD" and "/nar/" in path:
                asked.set()
                released.wait(PATIENCE_S)

        cache.fault = fault
        large = add(store, "large", os.urandom(3 << 20))
        assert asked.wait(PATIENCE_S)
        small = [add(store, f"small-{number}") for number in range(20)]
        watch.wait_for(*small)
        assert not (cache.directory / f"{large.path.hash_part}.narinfo").exists()
        released.set()
        watch.wait_for(large)
        assert not any((watch.state / "upload" / "nar").iterdir())

    @pytest.mark.parametrize("count", [600, pytest.param(100_000, marks=pytest.mark.slow)])
    def test_many_paths_at_once_need_little_memory(
        self, store: StoreBuilder, cache: PutServer, watch: Watch, count: int
    ) -> None:
        """The target is down meanwhile, so that all of them wait in the queue."""
        watch.record_statistics()
        watch.start()
        first = add(store, "first")
        watch.wait_for(first)
        wait_until(lambda: statistics(watch).items() >= {"uploaded_paths_total": 1, "queued_paths": 0}.items())
        assert watch.process
        before = peak_bytes(watch.process.pid)
        cache.stop()
        with store.connect() as connection:
            nar_hash, size = connection.execute("select hash, narSize from ValidPaths").fetchone()
            names = [f"{number:032}-first" for number in range(count)]
            connection.executemany(
                "insert into ValidPaths (path, hash, registrationTime, narSize) values (?, ?, 1, ?)",
                ((f"/nix/store/{name}", nar_hash, size) for name in names),
            )
        present = names[: min(1000, count // 2)]
        for name in present:  # the others are gone from the disk
            os.link(store.real_path(first.path), f"{store.real_dir}/{name}")
        wait_until(lambda: statistics(watch)["queued_paths"] == count)
        cache.start()
        wait_until(lambda: len(list(cache.directory.glob("*.narinfo"))) == 1 + len(present))
        assert watch.process
        assert peak_bytes(watch.process.pid) - before < 60 << 20


def statistics(watch: Watch) -> dict[str, float]:
    """Return the metrics of a watcher that is running, by the end of their names."""
    file = watch.directory / "run" / "metrics.prom"
    text = file.read_text() if file.exists() else ""
    lines = (line.partition(" ") for line in text.splitlines() if line.startswith("harmonia_watch_"))
    return {"queued_paths": -1.0} | {name.removeprefix("harmonia_watch_"): float(value) for name, _, value in lines}


def test_every_metric_is_documented_and_on_the_dashboard(store: StoreBuilder, watch: Watch) -> None:
    watch.record_statistics()
    watch.start()
    watch.wait_for(add(store, "path"))
    wait_until(lambda: len(statistics(watch)) > 1)
    names = {f"harmonia_watch_{name}" for name in statistics(watch) if not name.endswith("_created")}
    dashboard, alerts, page = (
        set(re.findall(r"\bharmonia_watch_\w+", (ROOT / "docs" / file).read_text()))
        for file in ("grafana-dashboard.json", "alerts.yml", "how-to/publish-builds.md")
    )
    assert dashboard == page == names
    assert {"harmonia_watch_target_up", "harmonia_watch_oldest_seconds"} == alerts


class TestFaults:
    def test_dead_target_is_waited_for(self, store: StoreBuilder, cache: PutServer, watch: Watch) -> None:
        cache.stop()
        watch.start()
        infos = [add(store, f"path-{number}") for number in range(100)]
        watch.wait_for_log("the target does not take uploads: .*; paths wait in the queue")
        cache.start()
        watch.wait_for(*infos)
        assert watch.text().count("the target does not take uploads") == 1
        assert watch.text().count("takes uploads again") == 1
        assert "cannot upload" not in watch.text()

    def test_refused_path_delays_no_other_and_is_tried_again(
        self, store: StoreBuilder, cache: PutServer, watch: Watch
    ) -> None:
        refused = store.output_path("refused").hash_part
        cache.fault = lambda method, path: 409 if (method, path) == ("PUT", f"/{refused}.narinfo") else None
        watch.start()
        one = add(store, "refused")
        referrer = add(store, "referrer", references=(one,))
        watch.wait_for(add(store, "other"))
        watch.wait_for_log(rf"cannot upload {one.path}: .*status 409: because of the test; trying again in \d+ s")
        cache.fault = lambda _method, _path: None
        watch.wait_for(one, referrer)

    def test_path_that_breaks_each_connection_delays_no_other(
        self, store: StoreBuilder, cache: PutServer, watch: Watch
    ) -> None:
        broken = store.output_path("broken").hash_part
        cache.fault = lambda method, path: 0 if (method, path) == ("PUT", f"/{broken}.narinfo") else None
        watch.start()
        one = add(store, "broken")
        watch.wait_for_log(rf"cannot upload {one.path}")
        watch.wait_for(*[add(store, f"other-{number}") for number in range(10)])

    def test_path_stays_queued_until_the_target_has_its_closure(
        self, store: StoreBuilder, cache: PutServer, watch: Watch
    ) -> None:
        """The target has lost a reference, and refuses it at first."""
        watch.start()
        library = add(store, "library")
        program = add(store, "program", references=(library,))
        watch.wait_for(library, program)
        lost = f"/{library.path.hash_part}.narinfo"
        (cache.directory / lost[1:]).unlink()
        cache.fault = lambda method, path: 409 if (method, path) == ("PUT", lost) else None
        watch.stop()  # it remembers what the target has
        store.delete(program.path)
        add(store, "program", references=(library,))
        watch.start()
        watch.wait_for_log(rf"cannot upload {program.path}: .*status 409")
        cache.fault = lambda _method, _path: None
        watch.wait_for(library)

    def test_collected_path_is_dropped_with_a_word(self, store: StoreBuilder, cache: PutServer, watch: Watch) -> None:
        cache.stop()
        watch.start()
        gone = add(store, "gone")
        watch.wait_for_log("paths wait in the queue")
        store.delete(gone.path)
        cache.start()
        watch.wait_for_log(f"{gone.path} was garbage-collected before its upload; dropped")
        watch.wait_for(add(store, "later"))

    def test_damaged_path_is_tried_again_after_its_repair(
        self, store: StoreBuilder, cache: PutServer, watch: Watch
    ) -> None:
        watch.start()
        staged = add(store, "staged", bytes(3 << 20))
        watch.wait_for(staged)
        damaged = store.output_path("damaged")
        with store.connect() as connection:
            connection.execute(
                "insert into ValidPaths (path, hash, registrationTime, narSize)"
                " select ?, hash, 1, narSize from ValidPaths",
                (f"/nix/store/{damaged}",),
            )
        watch.wait_for_log(f"cannot upload {damaged}")
        os.link(store.real_path(staged.path), store.real_path(damaged))
        wait_until((cache.directory / f"{damaged.hash_part}.narinfo").exists)

    def test_malformed_row_delays_only_its_referrers(self, store: StoreBuilder, cache: PutServer, watch: Watch) -> None:
        cache.stop()
        watch.start()
        broken = store.add(store.output_path("broken"), b"broken", known_size=False)
        referrer = add(store, "referrer", references=(broken,))
        good = [add(store, f"good-{number}") for number in range(5)]
        watch.wait_for_log("paths wait in the queue")
        cache.start()
        watch.wait_for(*good)
        watch.wait_for_log(f"cannot upload {referrer.path}: cannot use the database's row for .*broken")

    def test_replaced_database_is_read_from_its_beginning(self, store: StoreBuilder, watch: Watch) -> None:
        old = add(store, "old")
        watch.start()
        watch.wait_for(add(store, "new"))
        os.rename(store.db_path, f"{store.db_path}.old")
        wait_until(lambda: "trying again every" in watch.text())
        subprocess.run(["cp", f"{store.db_path}.old", store.db_path], check=True)
        watch.wait_for(old)
        assert "the store's database was replaced" in watch.text()

    @pytest.mark.root
    def test_full_disk_loses_nothing(self, tmp_path: Path, store: StoreBuilder, watch: Watch) -> None:
        with mounted(tmp_path / "disk", "1m") as disk:
            watch.state = disk
            watch.start()
            watch.wait_for(add(store, "before"))
            filler = disk / "filler"
            with filler.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass
            infos = [add(store, f"path-{number}-{'x' * 150}") for number in range(100)]
            large = add(store, "large", os.urandom(3 << 20))
            watch.wait_for_log("cannot write the queue")
            filler.unlink()
            watch.wait_for(*infos)
            watch.wait_for_log(f"cannot upload {large.path}")
            watch.stop(signal.SIGKILL)

    @pytest.mark.parametrize("kills", [5, pytest.param(200, marks=pytest.mark.slow)])
    def test_killed_watcher_loses_nothing(
        self, store: StoreBuilder, cache: PutServer, watch: Watch, kills: int
    ) -> None:
        chance = random.Random(kills)
        watch.start()
        infos: list[PathInfo] = []
        for kill in range(kills):
            for number in range(chance.randrange(4)):
                references = tuple(chance.sample(infos, min(len(infos), 2)))
                size = chance.choice([10, 100_000, 2 << 20]) if number == 0 else 10
                infos.append(add(store, f"path-{kill}-{number}", chance.randbytes(size), references))
            time.sleep(chance.uniform(0, 0.3))
            watch.stop(signal.SIGKILL)
            cache.names()  # each has its references
            watch.start()
        watch.wait_for(*infos)
        assert cache.names() == {info.path for info in infos}


class TestFilters:
    def test_names_are_chosen_by_patterns(self, store: StoreBuilder, cache: PutServer, watch: Watch) -> None:
        watch.settings = "allow = ['app-*', 'lib-*']\ndeny = ['*-debug']"
        watch.start()
        library = add(store, "library")
        for name in ("other", "app-1-debug"):
            add(store, name)
        watch.wait_for(add(store, "app-1", references=(library,)), add(store, "lib-2"))
        assert {path[33:] for path in cache.names()} == {"app-1", "lib-2", "library"}

    def test_signed_paths_are_left_out_also_as_references(
        self, store: StoreBuilder, cache: PutServer, watch: Watch
    ) -> None:
        key = SecretKey.generate("public-1")
        watch.settings = f"not_signed_by = ['{key.public_key}']"
        watch.start()
        library = store.add(store.output_path("library"), b"library", keys=[key])
        forged = store.add(store.output_path("forged"), b"forged", sigs=library.sigs)
        app = add(store, "app", references=(library, forged))
        wait_until((cache.directory / f"{app.path.hash_part}.narinfo").exists)
        assert (cache.directory / f"{forged.path.hash_part}.narinfo").exists()
        assert not (cache.directory / f"{library.path.hash_part}.narinfo").exists()

    def test_roots_are_uploaded_when_they_change(
        self, store: StoreBuilder, cache: PutServer, watch: Watch, tmp_path: Path
    ) -> None:
        one, two = add(store, "one"), add(store, "two")
        root = tmp_path / "roots"
        root.mkdir()
        (root / "current").symlink_to(f"/nix/store/{one.path}")
        watch.settings = f"new_paths = false\ngc_roots = ['{root}']"
        watch.start()
        watch.wait_for(one)
        add(store, "three")
        (root / "next").symlink_to(f"/nix/store/{two.path}")
        watch.wait_for(two)
        assert cache.names() == {one.path, two.path}

    def test_uploads_are_signed(self, store: StoreBuilder, cache: PutServer, watch: Watch, tmp_path: Path) -> None:
        (tmp_path / "key").write_text(SecretKey.generate("watch-1").export())
        watch.environment["SIGN_KEY_PATHS"] = str(tmp_path / "key")
        watch.start()
        info = add(store, "signed")
        watch.wait_for(info)
        assert [sig.partition(":")[0] for sig in cache.narinfo(info.path)[0].sigs] == ["watch-1"]


class TestService:
    def test_cancellation_beside_a_new_path_is_not_lost(
        self, store: StoreBuilder, cache: PutServer, tmp_path: Path
    ) -> None:
        """asyncio.wait_for of Python 3.11 lost it, so the process did not stop at SIGTERM."""
        settings = Settings(real_nix_store=str(store.real_dir), nix_db_path=str(store.db_path), cache_dir=str(tmp_path))

        async def run(queue: UploadQueue, nars: NarFiles) -> None:
            target = HttpTarget(cache.url, "/nix/store", attempts=1)
            uploader = Uploader(Store.of(settings), target, nars, jobs=1)
            uploads = QueueUploader(Store.of(settings), queue, target, uploader)
            running = asyncio.create_task(uploads.run())
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.to_thread(wait_until, lambda: uploads.target_answers)
                await asyncio.sleep(0.1)  # it has looked at the queue, and waits
                await uploads.add([store.output_path("new")])
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
            assert running.cancelled()
            uploads.close()
            uploader.close()
            await target.close()

        with (
            closing(UploadQueue(str(tmp_path / "queue"))) as queue,
            closing(NarFiles(settings, str(store.real_dir), str(tmp_path))) as nars,
        ):
            asyncio.run(run(queue, nars))

    def test_it_is_ready_feeds_the_watchdog_and_stops(self, store: StoreBuilder, watch: Watch, tmp_path: Path) -> None:
        runtime = tmp_path / "run"
        runtime.mkdir()
        with ServiceManager(f"@harmonia-watch-{os.getpid()}") as manager:
            watch.environment = {**manager.environment, "WATCHDOG_USEC": "200000", "RUNTIME_DIRECTORY": str(runtime)}
            watch.start()
            assert {manager.receive() for _ in range(3)} >= {"READY=1", "WATCHDOG=1"}
            info = add(store, "path")
            watch.wait_for(info)

            def done() -> bool:
                manager.drain()  # with a full socket, the next message would block the watcher
                return statistics(watch).items() >= {"uploaded_paths_total": 1, "queued_paths": 0}.items()

            wait_until(done)  # a path leaves the queue after it is counted
            found = statistics(watch)
            assert (found["failing_paths"], found["target_up"]) == (0, 1)
            assert found["uploaded_bytes_total"] > 0
            assert watch.stop() == 0
        assert "stopped; the queue keeps what was not uploaded" in watch.text()

    def test_stop_does_not_wait_for_an_upload(self, store: StoreBuilder, cache: PutServer, watch: Watch) -> None:
        asked, stopped = threading.Event(), threading.Event()

        def hold(method: str, _path: str) -> None:
            if method == "POST":
                asked.set()
                assert stopped.wait(PATIENCE_S)

        cache.fault = hold
        watch.start()
        add(store, "path")
        assert asked.wait(PATIENCE_S)
        assert watch.stop() == 0
        stopped.set()

    def test_second_watcher_of_a_queue_is_refused(self, watch: Watch, tmp_path: Path) -> None:
        watch.start()
        answer = run("--config", str(tmp_path / "watch.toml"), "watch")
        assert (answer.returncode, "another process uses the queue" in answer.stderr) == (2, True)

    def test_missing_url_is_an_error(self) -> None:
        assert "give a URL, or set watch.url" in run("watch").stderr

    def test_netrc_setting_is_used(self, store: StoreBuilder, cache: PutServer, watch: Watch, tmp_path: Path) -> None:
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login ci password token")
        watch.settings = f"netrc = '{tmp_path}/netrc'"
        watch.start()
        watch.wait_for(add(store, "path"))
        assert cache.credentials == {"Basic Y2k6dG9rZW4="}

    def test_netrc_without_the_host_is_an_error(self, store: StoreBuilder, cache: PutServer, tmp_path: Path) -> None:
        (tmp_path / "netrc").write_text("machine other login ci password token")
        config = tmp_path / "watch.toml"
        config.write_text(
            f"nix_db_path = '{store.db_path}'\n[watch]\nurl = '{cache.url}'\nstate_dir = '{tmp_path}'\n"
            f"netrc = '{tmp_path}/netrc'"
        )
        answer = run("--config", str(config), "watch")
        assert answer.returncode == 2
        assert re.search(r"watch.toml:5: watch.netrc: no entry for 127.0.0.1 in ", answer.stderr)


class TestHook:
    @staticmethod
    def run_hook(address: Path, *infos: PathInfo, **environment: str) -> "subprocess.CompletedProcess[str]":
        names = " ".join(f"/nix/store/{info.path}" for info in infos)
        return subprocess.run(
            [sys.executable, "-m", "harmonia.hook", address],
            env={**os.environ, "OUT_PATHS": names, **environment},
            capture_output=True,
            text=True,
            check=True,
            timeout=PATIENCE_S,
        )

    def test_paths_of_the_hook_are_uploaded(
        self, store: StoreBuilder, cache: PutServer, watch: Watch, tmp_path: Path
    ) -> None:
        address = tmp_path / "socket"
        watch.settings = f"new_paths = false\nsocket = '{address}'"
        watch.start()
        built = [add(store, f"built-{number}") for number in range(3)]
        add(store, "substituted")
        answer = self.run_hook(address, *built)
        assert answer.stdout + answer.stderr == ""
        watch.wait_for(*built)
        assert cache.names() == {info.path for info in built}
        assert stat.S_IMODE(address.stat().st_mode) == 0o600

    def test_handed_over_paths_survive_a_kill(self, store: StoreBuilder, watch: Watch, tmp_path: Path) -> None:
        address = tmp_path / "socket"
        watch.settings = f"new_paths = false\nsocket = '{address}'"
        watch.record_statistics()
        watch.cache.fault = lambda _method, _path: 503
        watch.start()
        built = add(store, "built")
        self.run_hook(address, built)
        wait_until(lambda: statistics(watch)["queued_paths"] == 1)
        watch.stop(signal.SIGKILL)
        watch.cache.fault = lambda _method, _path: None
        watch.start()
        watch.wait_for(built)

    def test_derivation_stands_for_its_outputs(
        self, store: StoreBuilder, cache: PutServer, watch: Watch, tmp_path: Path
    ) -> None:
        """Nix 2.8.0 does not name the outputs."""
        address = tmp_path / "socket"
        watch.settings = f"new_paths = false\nsocket = '{address}'"
        watch.start()
        derivation, output = store.add_derivation("built", "/bin/sh")
        built = store.add(output, b"built", deriver=derivation.path)
        self.run_hook(address, DRV_PATH=f"/nix/store/{derivation.path}")
        watch.wait_for(built)
        assert cache.names() == {output}

    def test_malformed_names_are_dropped_with_a_word(self, store: StoreBuilder, watch: Watch, tmp_path: Path) -> None:
        address = tmp_path / "socket"
        watch.settings = f"socket = '{address}'"
        watch.start()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(address))
            client.sendall(b"/etc/passwd \xff\xfe /nix/store/short\n")
        watch.wait_for_log("watch.socket: .*passwd")
        watch.wait_for(add(store, "path"))

    def test_hook_succeeds_without_a_watcher(self, store: StoreBuilder, tmp_path: Path) -> None:
        info = add(store, "path")
        answer = self.run_hook(tmp_path / "none", info)
        assert "No such file or directory; build results are not handed over" in answer.stderr
        with socket.socket(socket.AF_UNIX) as deaf:
            deaf.bind(str(tmp_path / "deaf"))
            deaf.listen(0)
            for _ in range(3):  # the backlog is full after two
                self.run_hook(tmp_path / "deaf", info)

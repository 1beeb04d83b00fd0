"""`harmonia push`: the missing paths of a closure, references first, to any cache that takes PUT."""

import asyncio
import hashlib
import os
import random
import re
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from harmonia.cache import growing_file
from harmonia.config.loader import parse
from harmonia.nix import base32
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import PublicKey, SecretKey
from harmonia.tools.fixture_tree import remove_tree
from harmonia.tools.store_builder import StoreBuilder
from harmonia.upload.nar_files import NarFiles
from support import preloaded
from support.nginx import nginx
from support.put_server import PutServer, put_server
from support.running import HARMONIA, PATIENCE_S, Server, patched, run, unpacked

FAST = patched("from harmonia.upload import http_target; http_target._FIRST_DELAY_S = 0.001")
"""The program, whose attempts follow each other at once."""


@pytest.fixture
def store(tmp_path: Path) -> StoreBuilder:
    return StoreBuilder(tmp_path / "store")


@pytest.fixture
def config(store: StoreBuilder, tmp_path: Path) -> Path:
    file = tmp_path / "push.toml"
    file.write_text(
        f"real_nix_store = '{store.real_dir}'\nnix_db_path = '{store.db_path}'\ncache_dir = '{tmp_path}/cache'\n"
    )
    return file


@pytest.fixture(params=[False, True], ids=["heads", "bulk"])
def cache(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[PutServer]:
    with put_server(tmp_path / "target", bulk=request.param) as server:
        yield server


def run_fast(*arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command of Harmonia whose attempts follow each other at once."""
    pipe = subprocess.PIPE
    command = [*FAST, *arguments]
    environment = {**os.environ, **(environment or {})}
    with preloaded.popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            stdout, stderr = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@pytest.fixture
def push(config: Path, cache: PutServer) -> "Push":
    def push(*paths: object, url: str = "", status: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
        answer = run_fast("--config", str(config), "push", url or cache.url, *map(str, paths), **options)
        assert answer.returncode == status, answer.stderr
        assert "Traceback" not in answer.stderr
        return answer

    return push


def add_closure(store: StoreBuilder) -> list[PathInfo]:
    """Add four paths, each of which refers to earlier ones, and the last one to itself."""
    one = store.add_text("one", b"one\n")
    two = store.add(store.output_path("two"), os.urandom(1000) * 3000, references=[one.path])
    three = store.add(store.output_path("three"), b"three\n", references=[one.path])
    top = store.output_path("top")
    return [one, two, three, store.add(top, b"top\n", references=[one.path, two.path, three.path, top])]


def full(info: PathInfo) -> str:
    return f"/nix/store/{info.path}"


def counts(stderr: str) -> tuple[int, ...]:
    """Return the numbers of pushed, existing and failed paths."""
    match = re.search(r"(\d+) pushed, (\d+) already there(?:, (\d+) failed)?", stderr)
    assert match, stderr
    return tuple(int(count or 0) for count in match.groups())


Push = Callable[..., subprocess.CompletedProcess[str]]


class TestClosure:
    def test_closure_is_complete_and_references_come_first(
        self, store: StoreBuilder, cache: PutServer, push: Push
    ) -> None:
        infos = add_closure(store)
        other = store.add_text("other", b"not in the closure\n")
        assert counts(push(full(infos[-1])).stderr) == (4, 0, 0)
        assert cache.names() == {str(info.path) for info in infos}
        assert not (cache.directory / f"{other.path.hash_part}.narinfo").exists()
        order = [path[1:33] for path in cache.paths("PUT") if path.endswith(".narinfo")]
        for info in infos:
            before = order[: order.index(info.path.hash_part)]
            assert all(reference.hash_part in before for reference in info.references if reference != info.path)
        for info in infos:
            found, nar = cache.narinfo(info.path)
            assert found == info
            file = (cache.directory / nar.url).read_bytes()
            assert (nar.file_size, nar.compression) == (len(file), "zstd")
            assert len(unpacked(file)) == info.nar_size
        if not cache.bulk:
            assert (cache.directory / "nix-cache-info").read_text() == "StoreDir: /nix/store\n"

    def test_what_is_there_is_not_sent_again(self, store: StoreBuilder, cache: PutServer, push: Push) -> None:
        infos = add_closure(store)
        push(full(infos[1]))
        before = len(cache.requests)
        assert counts(push(full(infos[-1])).stderr) == (2, 2, 0)
        sent = [path for method, path in cache.requests[before:] if method == "PUT"]
        assert len([path for path in sent if "narinfo" in path]) == 2
        assert len([path for path in sent if "nar/" in path]) == 2
        before = len(cache.requests)
        assert counts(push(full(infos[-1])).stderr) == (0, 4, 0)
        asked = [method for method, _ in cache.requests[before:]]
        assert sorted(asked) == (["GET", "POST"] if cache.bulk else ["GET", *["HEAD"] * 4])

    def test_nar_that_is_there_without_its_narinfo_is_not_sent_again(
        self, store: StoreBuilder, cache: PutServer, push: Push
    ) -> None:
        large = store.add(store.output_path("large"), os.urandom(2 << 20))
        push(full(large))
        (cache.directory / f"{large.path.hash_part}.narinfo").unlink()
        push(full(large))
        assert len([path for path in cache.paths("PUT") if "nar/" in path]) == 1
        _, nar = cache.narinfo(large.path)
        (cache.directory / nar.url).write_bytes(b"a part of it")
        (cache.directory / f"{large.path.hash_part}.narinfo").unlink()
        push(full(large))
        assert len(unpacked((cache.directory / nar.url).read_bytes())) == large.nar_size

    def test_paths_come_from_standard_input_and_symlinks(
        self, store: StoreBuilder, cache: PutServer, config: Path, tmp_path: Path
    ) -> None:
        infos = add_closure(store)
        (tmp_path / "result").symlink_to(full(infos[0]))
        command = [*HARMONIA, "--config", str(config), "push", "-q", cache.url, "-"]
        lines = f"{tmp_path}/result\n{full(infos[2])}\n"
        answer = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
        assert answer.stdout + answer.stderr == ""
        assert cache.names() == {infos[0].path, infos[2].path}

    def test_servers_file_of_the_nar_is_sent(
        self, store: StoreBuilder, cache: PutServer, push: Push, config: Path, tmp_path: Path
    ) -> None:
        large = store.add(store.output_path("large"), os.urandom(100) * 50_000)
        assert run("--config", str(config), "warm", full(large)).returncode == 0
        [file] = (tmp_path / "cache" / "nar").iterdir()
        os.utime(file, (0, 0))
        with open(store.real_path(large.path), "wb") as damaged:
            damaged.write(bytes(5_000_000))
        push(full(large))
        _, nar = cache.narinfo(large.path)
        assert file.read_bytes().startswith((cache.directory / nar.url).read_bytes())
        assert file.stat().st_mtime > 0  # a use, for its eviction
        assert {each.name for each in (tmp_path / "cache" / "nar").iterdir()} == {file.name}

    def test_many_paths_need_few_questions(self, store: StoreBuilder, cache: PutServer, push: Push) -> None:
        infos = [store.add_text(f"text-{number}", str(number).encode()) for number in range(50)]
        top = store.add_text("top", b"top", [info.path for info in infos])
        assert counts(push(full(top), "--jobs", "3").stderr) == (51, 0, 0)
        assert len(cache.paths("POST")) == cache.bulk
        assert len(cache.names()) == 51


class TestSignatures:
    def test_signatures_are_kept_and_a_key_adds_its_own(
        self, store: StoreBuilder, cache: PutServer, push: Push, tmp_path: Path
    ) -> None:
        old, new = SecretKey.generate("old-1"), SecretKey.generate("new-1")
        info = store.add(store.output_path("signed"), b"signed", keys=[old])
        (tmp_path / "key").write_text(new.export())
        push(full(info), "--key", tmp_path / "key")
        found, _ = cache.narinfo(info.path)
        assert {sig.partition(":")[0] for sig in found.sigs} == {"old-1", "new-1"}
        public = PublicKey.parse(str(new.public_key))
        assert any(public.verify(info.fingerprint("/nix/store"), sig) for sig in found.sigs)

    def test_file_without_a_key_is_an_error(self, store: StoreBuilder, push: Push, tmp_path: Path) -> None:
        info = store.add_text("text", b"text")
        (tmp_path / "key").write_text("secret")
        assert "secret" not in push(full(info), "--key", tmp_path / "key", status=2).stderr.replace("no secret key", "")
        assert "No such file" in push(full(info), "--key", tmp_path / "none", status=2).stderr


class TestFailures:
    @pytest.mark.parametrize("status", [0, 408, 429, 500, 503])
    def test_failures_are_retried(self, store: StoreBuilder, cache: PutServer, push: Push, status: int) -> None:
        infos = add_closure(store)
        chance, lock = random.Random(status), threading.Lock()
        failed: dict[str, int] = {}

        def fault(method: str, path: str) -> int | None:
            with lock:
                if failed.get(method + path, 0) < 3 and chance.random() < 0.5:
                    failed[method + path] = failed.get(method + path, 0) + 1
                    return status
            return None

        cache.fault = fault
        assert counts(push(full(infos[-1])).stderr) == (4, 0, 0)
        assert cache.names() == {str(info.path) for info in infos}
        assert failed

    def test_dead_target_is_an_error_and_the_next_run_continues(
        self, store: StoreBuilder, cache: PutServer, push: Push
    ) -> None:
        infos = add_closure(store)
        top = infos[-1].path.hash_part
        cache.fault = lambda method, path: 503 if (method, path) == ("PUT", f"/{top}.narinfo") else None
        answer = push(full(infos[-1]), status=1)
        assert f"PUT {top}.narinfo: status 503: because of the test; run the same command again" in answer.stderr
        cache.names()  # each has its references
        cache.fault = lambda _method, _path: None
        assert counts(push(full(infos[-1])).stderr) == (1, 3, 0)

    def test_unreachable_target_is_an_error(self, store: StoreBuilder, cache: PutServer, push: Push) -> None:
        info = store.add_text("text", b"text")
        cache.stop()
        answer = push(full(info), status=1)
        assert re.fullmatch(rf"harmonia: {cache.url}: GET nix-cache-info: .*\n", answer.stderr)

    def test_refused_path_fails_with_its_referrers_and_others_are_pushed(
        self, store: StoreBuilder, cache: PutServer, push: Push
    ) -> None:
        one, _two, three, top = add_closure(store)
        refused = f"/{three.path.hash_part}.narinfo"
        cache.fault = lambda method, path: 413 if (method, path) == ("PUT", refused) else None
        answer = push(full(top), status=1)
        assert counts(answer.stderr) == (2, 0, 2)
        assert f"failed: {full(three)}: {cache.url}: PUT {refused[1:]}: status 413: because" in answer.stderr
        assert cache.narinfo(one.path)
        assert len(cache.names()) == 2

    def test_missing_credentials_are_named(self, store: StoreBuilder, cache: PutServer, push: Push) -> None:
        info = store.add_text("text", b"text")
        cache.fault = lambda _method, _path: 401
        assert "watch.netrc): machine 127.0.0.1 login" in push(full(info), status=1).stderr
        assert len(cache.requests) == 1

    def test_netrc_is_used(self, store: StoreBuilder, cache: PutServer, push: Push, tmp_path: Path) -> None:
        info = store.add_text("text", b"text")
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login ci password token")
        push(full(info), environment={"NETRC": str(tmp_path / "netrc")})
        assert cache.credentials == {"Basic Y2k6dG9rZW4="}

    @pytest.mark.parametrize(
        ("url", "message"),
        [
            ("https://user:secret@cache", "user and password in the URL"),
            ("http://cache?secret-key=x", "use|sign with --key"),
            ("ftp://cache", "is not a URL like"),
            ("cache", "is not a URL like"),
            ("http://[", "is not a URL like"),
        ],
    )
    def test_wrong_url_is_an_error(self, push: Push, url: str, message: str) -> None:
        answer = push("/nix/store/x", url=url, status=2)
        assert re.search(message, answer.stderr)
        assert "secret@" not in answer.stderr

    def test_cache_of_another_store_is_refused(self, store: StoreBuilder, cache: PutServer, push: Push) -> None:
        info = store.add_text("text", b"text")
        cache.bulk = False
        (cache.directory / "nix-cache-info").write_text("StoreDir: /gnu/store\n")
        assert "it is for the store '/gnu/store', not for /nix/store" in push(full(info), status=1).stderr

    def test_damaged_and_collected_paths_fail(self, store: StoreBuilder, cache: PutServer, push: Push) -> None:
        small = store.add(store.output_path("small"), b"small")
        large = store.add(store.output_path("large"), bytes(5 << 20))
        for info in (small, large):
            with open(store.real_path(info.path), "r+b") as file:
                file.write(b"x")
        gone = store.add(store.output_path("gone"), bytes(3 << 20))
        remove_tree(store.real_path(gone.path))
        good = store.add_text("good", b"good")
        answer = push(*map(full, (small, large, gone, good)), status=1)
        assert counts(answer.stderr) == (1, 0, 3)
        assert cache.names() == {good.path}

    def test_bulk_question_that_fails_is_replaced(self, store: StoreBuilder, cache: PutServer, push: Push) -> None:
        infos = add_closure(store)
        cache.fault = lambda method, _path: 405 if method == "POST" else None
        assert counts(push(full(infos[-1])).stderr) == (4, 0, 0)
        assert len([path for path in cache.paths("HEAD") if "narinfo" in path]) == 4

    def test_interrupted_push_ends_at_once_and_leaves_nothing(
        self, store: StoreBuilder, cache: PutServer, config: Path, tmp_path: Path
    ) -> None:
        large = store.add(store.output_path("large"), os.urandom(2 << 20))
        asked, ended = threading.Event(), threading.Event()

        def fault(method: str, path: str) -> None:
            if method == "PUT" and "nar/" in path:
                asked.set()
                ended.wait(PATIENCE_S)

        cache.fault = fault
        (tmp_path / "tmp").mkdir()
        with preloaded.popen(
            [*HARMONIA, "--config", str(config), "push", cache.url, full(large)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
        ) as process:
            assert asked.wait(PATIENCE_S)
            process.send_signal(2)
            _, stderr = process.communicate(timeout=PATIENCE_S)
        ended.set()
        assert (process.returncode, stderr) == (130, "harmonia: interrupted; the same command continues\n")
        assert not any((tmp_path / "tmp").iterdir())


def test_file_stays_open_while_a_cancelled_upload_still_reads_it(
    store: StoreBuilder, config: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise the read fails, and the file is reported as damaged."""
    info = store.add(store.output_path("large"), os.urandom(2 << 20))
    began, goes_on = threading.Event(), threading.Event()
    read = growing_file._VerifiedSlice.read  # noqa: SLF001 (a private part is tested)

    def slow(part: growing_file._VerifiedSlice, size: int) -> bytes:
        began.set()
        assert goes_on.wait(PATIENCE_S)
        return read(part, size)

    async def upload() -> None:
        monkeypatch.setattr(growing_file._VerifiedSlice, "read", slow)  # noqa: SLF001 (a private part is tested)
        body = await nars.open_file(info)
        task = asyncio.ensure_future(anext(aiter(body.chunks())))
        task.add_done_callback(lambda _: body.close())
        await asyncio.to_thread(began.wait, PATIENCE_S)
        task.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        goes_on.set()
        await asyncio.wait({task})

    with closing(NarFiles(parse(config.read_text(), str(config), {}), store.real_dir)) as nars:
        asyncio.run(upload())
    assert "damaged" not in caplog.text


@pytest.mark.parametrize("mode", [0o700, 0o711])
def test_cache_of_a_server_with_other_settings_keeps_its_mode(
    store: StoreBuilder, config: Path, tmp_path: Path, mode: int
) -> None:
    """With `nginx_location`, nginx may read the server's cache."""
    directory = tmp_path / "cache" / "nar"
    directory.mkdir(parents=True)
    directory.chmod(mode)
    settings = parse(config.read_text(), str(config), {})
    with closing(NarFiles(settings, store.real_dir)):
        assert stat.S_IMODE(directory.stat().st_mode) == mode


def test_directory_behind_nginx_takes_a_push(store: StoreBuilder, config: Path, tmp_path: Path) -> None:
    infos = add_closure(store)
    root = tmp_path / "files"
    root.mkdir()
    dav = f"root {root}; client_max_body_size 4m; location / {{ dav_methods PUT; create_full_put_path on; }}"
    with nginx(tmp_path / "nginx", dav) as (url, _):
        assert counts(run("--config", str(config), "push", url, full(infos[-1])).stderr) == (4, 0, 0)
        assert len(list(root.glob("*.narinfo"))) == 4
        huge = store.add(store.output_path("huge"), os.urandom(20 << 20))
        answer = run("--config", str(config), "push", url, full(huge))
        assert (answer.returncode, "status 413" in answer.stderr) == (1, True), answer.stderr
        assert counts(run("--config", str(config), "push", url, full(infos[-1])).stderr) == (0, 4, 0)
    _, two, _, _ = infos
    [file] = [file for file in (root / "nar").iterdir() if len(unpacked(file.read_bytes())) == two.nar_size]
    assert base32.encode(hashlib.sha256(file.read_bytes()).digest()) in file.name


def test_another_harmonia_reads_the_result(
    store: StoreBuilder, config: Path, cache: PutServer, tmp_path: Path, start: Callable[..., Server]
) -> None:
    infos = add_closure(store)
    assert run("--config", str(config), "push", cache.url, full(infos[-1])).returncode == 0
    StoreBuilder(tmp_path / "empty")
    server = start(store=tmp_path / "empty", settings=f"[[upstream]]\nurl = '{cache.url}'\npublic_keys = []\n")
    for info in infos:
        assert f"NarSize: {info.nar_size}\n" in server.get(f"/{info.path.hash_part}.narinfo").text

"""Paths that the store lacks come from the mirror's bucket, and the server works on without the bucket."""

import hashlib
import random
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harmonia.nix import narinfo
from harmonia.nix.narinfo import NarFile
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey
from harmonia.tools.store_builder import StoreBuilder
from support.faulty_network import SLOW_DOWN, FaultyNetwork
from support.preloaded import NOT_PRELOADED
from support.running import PATIENCE_S, Server, run, wait_until
from support.s3_service import S3, Folder
from support.upstream_server import UpstreamServer

pytestmark = pytest.mark.s3

Start = Callable[..., Server]
KEY = SecretKey.generate("mirror-1")
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


@pytest.fixture
def private(s3_service: S3, tmp_path: Path) -> Folder:
    """Return an empty folder in a bucket that nobody may read without a key."""
    return s3_service.folder(tmp_path, "private")


@pytest.fixture
def remote(private: Folder, tmp_path: Path) -> list[PathInfo]:
    """Write a closure to the bucket, and return its paths, references first."""
    store = StoreBuilder(tmp_path / "remote")
    content = random.Random(5)
    dep = store.add(store.output_path("dep"), content.randbytes(3000))
    top = store.add(store.output_path("top"), content.randbytes(600_000), references=[dep.path])
    config = tmp_path / "writer.toml"
    config.write_text(
        f"real_nix_store = '{store.real_dir}'\nnix_db_path = '{store.db_path}'\ncache_dir = '{tmp_path}/writer'\n"
        f"sign_key_paths = ['{key_file(tmp_path)}']\n{private.settings()}"
    )
    answer = run("--config", str(config), "mirror", top.path)
    assert answer.returncode == 0, answer.stderr
    return [dep, top]


@pytest.fixture
def network(s3_service: S3) -> Iterator[FaultyNetwork]:
    with FaultyNetwork(int(s3_service.url.rpartition(":")[2])) as network:
        yield network


def key_file(directory: Path) -> Path:
    file = directory / "key"
    file.write_text(KEY.export())
    file.chmod(0o600)
    return file


class Reader:
    """Starts servers that read the bucket, with a store that has one other path."""

    def __init__(self, start: Start, directory: Path, folder: Folder) -> None:
        self._start = start
        self._directory = directory
        self._folder = folder
        self.own = StoreBuilder(directory / "own").add_text("own", b"own")

    def start(
        self, more: str = "", settings: str = "", *, who: str = "reader", timeout: float = 60.0, **options: object
    ) -> Server:
        keys = f"sign_key_paths = ['{key_file(self._directory)}']"
        mirror = self._folder.settings(more, who=who)
        settings = f"upstream_timeout = {timeout}\n{keys}\n{settings}\n{mirror}"
        server = self._start(store=self._directory / "own", settings=settings, **options)
        if who == "reader" and not options:
            wait_until(lambda: state(server).endswith(": up\n"))
        return server


@pytest.fixture
def reader(start: Start, tmp_path: Path, private: Folder) -> Reader:
    return Reader(start, tmp_path, private)


def parsed(server: Server, info: PathInfo) -> tuple[PathInfo, NarFile]:
    answer = server.get(f"/{info.path.hash_part}.narinfo")
    assert answer.status == 200
    return narinfo.parse(answer.text, "/nix/store")


def state(server: Server) -> str:
    return server.get("/health?verbose").text


def test_path_of_a_private_bucket_is_served_and_kept(
    reader: Reader, private: Folder, remote: list[PathInfo], network: FaultyNetwork
) -> None:
    private.endpoint = network.url
    server = reader.start()
    top = remote[1]
    found, nar = parsed(server, top)
    assert found.nar_hash == top.nar_hash
    assert "X-Amz" not in nar.url
    content = server.get(f"/{nar.url}").body
    assert hashlib.sha256(content).digest() == nar.file_hash
    assert server.get(f"/{nar.url}", headers={"Range": "bytes=1000-"}).body == content[1000:]
    assert server.get(f"/{top.path.hash_part}.ls").body == private.get(f"{top.path.hash_part}.ls")
    wait_until(lambda: any((server.cache_dir / "narinfo").iterdir()))
    network.down = True
    assert server.get(f"/{nar.url}").body == content


@pytest.mark.usefixtures("remote")
def test_missing_path_gets_404(reader: Reader, private: Folder) -> None:
    server = reader.start()
    assert server.get(f"/{'0' * 32}.narinfo").status == 404
    assert state(server).splitlines()[-1] == f"mirror {private.url}: up"


def test_bucket_precedes_upstreams(reader: Reader, remote: list[PathInfo]) -> None:
    with UpstreamServer() as upstream:
        server = reader.start(f"[[upstream]]\nurl = '{upstream.url}'\n")
        parsed(server, remote[0])
        assert not [line for line in upstream.asked if ".narinfo" in line]
        server.get(f"/{'0' * 32}.narinfo")
        assert [line for line in upstream.asked if ".narinfo" in line]


def test_nar_is_redirected_to_a_signed_url_if_set(reader: Reader, remote: list[PathInfo]) -> None:
    server = reader.start("redirect = true")
    _, nar = parsed(server, remote[1])
    assert nar.url.startswith("upstream/")
    for method in ("GET", "HEAD"):
        answer = server.request(method, f"/{nar.url}")
        assert (answer.status, answer.headers["cache-control"]) == (307, "no-store, no-transform")
        request = urllib.request.Request(answer.headers["location"], method=method)
        with urllib.request.urlopen(request) as response:
            assert int(response.headers["Content-Length"]) == nar.file_size
    request = urllib.request.Request(server.get(f"/{nar.url}").headers["location"], headers={"Range": "bytes=9-"})
    with urllib.request.urlopen(request) as response:
        assert (response.status, len(response.read())) == (206, (nar.file_size or 0) - 9)
    assert not list((server.cache_dir / "nar").iterdir())


def test_path_without_a_signature_by_our_keys_is_not_served(
    reader: Reader, private: Folder, remote: list[PathInfo]
) -> None:
    key = f"{remote[0].path.hash_part}.narinfo"
    private.put(key, private.get(key).replace(b"Sig: mirror-1:", b"Sig: mirror-2:"))
    server = reader.start()
    assert server.get(f"/{key}").status == 404
    server.wait_for_log("no signature by any of public_keys")


def test_server_without_a_store_is_a_gate(tmp_path: Path, private: Folder, remote: list[PathInfo]) -> None:
    server = Server(tmp_path / "gate", tmp_path / "nothing")
    settings = server.config.read_text().splitlines()
    kept = [line for line in settings if not line.startswith(("real_nix_store", "nix_db_path", "daemon_socket"))]
    keys = f"upstream_timeout = 60.0\nsign_key_paths = ['{key_file(tmp_path)}']"
    server.config.write_text("\n".join((*kept, "local_store = false", keys, private.settings(who="reader"))))
    server.start()
    try:
        for info in remote:
            _, nar = parsed(server, info)
            assert hashlib.sha256(server.get(f"/{nar.url}").body).digest() == nar.file_hash
        assert server.get(f"/{'0' * 32}.narinfo").status == 404
        assert server.get("/health").status == 200
        assert server.get("/nix-cache-info").text.startswith("StoreDir: /nix/store\n")
        assert server.get("/").status == 200
        assert server.get("/metrics").status == 200
    finally:
        server.stop()


def test_store_is_served_while_the_bucket_is_down(
    reader: Reader, private: Folder, remote: list[PathInfo], network: FaultyNetwork
) -> None:
    private.endpoint = network.url
    server = reader.start()
    parsed(server, remote[0])
    network.down = True
    for number in range(6):
        assert server.get(f"/{number:032}.narinfo").status == 404
    wait_until(lambda: state(server).endswith(": down\n"))
    assert server.get("/health").status == 200
    before = network.lookups
    for number in range(20):
        parsed(server, reader.own)
        assert server.get(f"/{100 + number:032}.narinfo").status == 404
    assert network.lookups == before  # no request waits for the bucket
    assert f'harmonia_upstream_up{{upstream="{network.url}/private/{private.prefix}"}} 0' in server.get("/metrics").text
    network.down = False
    wait_until(lambda: state(server).endswith(": up\n"))
    parsed(server, remote[1])


def test_overloaded_bucket_is_left_alone_until_it_answers(
    reader: Reader, private: Folder, remote: list[PathInfo], network: FaultyNetwork
) -> None:
    private.endpoint = network.url
    server = reader.start()
    network.answer = SLOW_DOWN
    for info in remote:
        assert server.get(f"/{info.path.hash_part}.narinfo").status == 404
    assert server.get(f"/{'1' * 32}.narinfo").status == 404
    server.wait_for_log(r"is down: status 503 \(SlowDown\); it is probed until it answers")
    parsed(server, reader.own)
    network.answer = None
    wait_until(lambda: state(server).endswith(": up\n"))
    wait_until(lambda: server.get(f"/{remote[0].path.hash_part}.narinfo").status == 200)


def test_bucket_that_never_answers_delays_no_client_for_longer_than_its_timeout(
    reader: Reader, private: Folder, remote: list[PathInfo], network: FaultyNetwork
) -> None:
    private.endpoint = network.url
    server = reader.start(timeout=1.0)
    network.delay = PATIENCE_S
    assert server.get(f"/{remote[0].path.hash_part}.narinfo").status == 404
    for number in range(3):
        server.get(f"/{number:032}.narinfo")
    server.wait_for_log(r"is down: (late response|timeout)")
    before = network.lookups
    parsed(server, reader.own)
    assert server.get(f"/{'9' * 32}.narinfo").status == 404
    assert network.lookups == before
    network.released.set()


def test_wrong_secret_is_logged_without_it_and_the_store_is_served(reader: Reader, remote: list[PathInfo]) -> None:
    server = reader.start(who="wrong")
    assert server.get(f"/{remote[0].path.hash_part}.narinfo").status == 404
    parsed(server, reader.own)
    assert state(server).endswith(": down\n")
    server.wait_for_log(r"cannot be used: status 403 \(SignatureDoesNotMatch\)")
    assert "s3cr3t" not in "".join(server.log)


@pytest.mark.skipif(FAKETIME is None, reason="no faketime on this machine: apt-get install faketime")
def test_wrong_clock_is_logged_and_the_store_is_served(reader: Reader, remote: list[PathInfo]) -> None:
    environment = {"LD_PRELOAD": str(FAKETIME), "FAKETIME": "-2h", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    server = reader.start(settings="debug_info = false", environment=environment, program=NOT_PRELOADED)
    assert server.get(f"/{remote[0].path.hash_part}.narinfo").status == 404
    parsed(server, reader.own)
    server.wait_for_log(r"cannot be used: status 40[03]")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("local_store = false", "local_store: false without a [mirror] to read and without any [[upstream]]"),
        (
            "[mirror]\nendpoint = 'http://x'\nbucket = 'abc'\nredirect = true",
            "mirror.redirect: set without credentials_file",
        ),
        (
            "[publish]\nallow = ['a*']\n[mirror]\nendpoint = 'http://x'\nbucket = 'abc'",
            "publish: publish rules do not apply to paths from the bucket of [mirror]; set mirror.read = false",
        ),
        (
            "[mirror]\nendpoint = 'http://x'\nbucket = 'abc'\ncredentials_file = '/nonexistent'",
            "mirror.credentials_file: cannot read '/nonexistent': No such file or directory; name a readable file",
        ),
    ],
)
def test_wrong_settings_stop_the_start_with_one_line(tmp_path: Path, settings: str, expected: str) -> None:
    store = StoreBuilder(tmp_path / "store")
    store.add_text("own", b"own")
    config = tmp_path / "harmonia.toml"
    config.write_text(
        f"bind = '127.0.0.1:0'\nreal_nix_store = '{store.real_dir}'\nnix_db_path = '{store.db_path}'\n"
        f"cache_dir = '{tmp_path}/cache'\n{settings}\n"
    )
    for command in ("serve", "check-config"):
        answer = run("--config", str(config), command)
        assert answer.returncode == 2
        assert expected in answer.stderr
        assert answer.stderr.count("\n") == 1

"""With `nginx_location`, nginx sends complete cached NARs itself, and a client sees no difference but the speed."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from harmonia.config.tokens import new
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey
from harmonia.tools.store_builder import StoreBuilder
from support.disk_cache import flip
from support.nginx import nginx
from support.nix_client import NIXES, Client
from support.pages import BLOCKS
from support.programs import needs
from support.running import Answer, Server, case, file_url, unpacked, wait_until

Start = Callable[..., Server]

SIZE = 2 << 20
SETTINGS = "nginx_location = '/harmonia-nar/'\ntrusted_proxies = ['127.0.0.1']\naccess_log = true\n"

pytestmark = needs("nginx")


@pytest.fixture
def store(tmp_path: Path) -> StoreBuilder:
    return StoreBuilder(tmp_path / "store")


@pytest.fixture
def info(store: StoreBuilder) -> PathInfo:
    return store.add(store.output_path("random"), Random(1).randbytes(SIZE))


@pytest.fixture
def server(start: Start, info: PathInfo, tmp_path: Path) -> Server:  # noqa: ARG001 (adds the path)
    return start(store=tmp_path / "store", settings=SETTINGS)


class Front(Server):
    """A server, requested through nginx."""

    def __init__(self, server: Server, url: str, log: Path) -> None:
        self.__dict__.update(server.__dict__)
        self.url = url
        self._sent = log

    @property
    def from_files(self) -> list[str]:
        """Method, status and bytes of each response that nginx sent from a file. Complete when nginx has ended."""
        lines = (line.partition(" by ") for line in self._sent.read_text().splitlines())
        return [request for request, _, uri_and_upstream in lines if uri_and_upstream in {"file 200", "file 206"}]


@contextmanager
def behind_nginx(server: Server, directory: Path, cache_dir: Path | None = None) -> Iterator[Front]:
    """Run nginx with the locations of the documentation, and the files in `cache_dir` instead of the server's."""
    page = "docs/how-to/reverse-proxy.md"
    whole, added = (block.text for block in BLOCKS if (block.page, block.language) == (page, "nginx"))
    proxied = whole.partition("location / {")[2].partition("}")[0]
    locations = added.replace("/var/cache/harmonia/", f"{cache_dir or server.cache_dir}/")
    locations = locations.replace("# … as above, and:", proxied)
    locations = locations.replace("# … the other lines of `location /`, and:", proxied.replace("proxy_pass", "#"))
    log = directory / "nginx" / "sent.log"
    http = f"""
        upstream harmonia {{ server {server.url.removeprefix("http://")}; }}
        map $uri $kind {{ ~^/harmonia-nar/ file; default proxied; }}
        log_format sent '$request_method $status $body_bytes_sent by $kind $upstream_status'; access_log {log} sent;
    """
    with nginx(directory / "nginx", locations, http) as (url, _):
        yield Front(server, url, log)


def files(server: Server) -> list[Path]:
    """Return the complete files of the cache."""
    return [file for file in (server.cache_dir / "nar").iterdir() if file.suffix not in {".sums", ".growing"}]


def verified(server: Server, info: PathInfo, headers: Mapping[str, str] | None = None) -> Answer:
    """Let Harmonia cache and verify a NAR, without nginx. Return its last response."""
    server.get(file_url(info), headers)
    wait_until(lambda: files(server))
    return server.get(file_url(info), headers)


def visible(answer: Answer) -> tuple[int, bytes, dict[str, str]]:
    """Return status, body and fields of a response, without those that depend on the connection or the program.

    nginx sends no Accept-Ranges with a range.
    """
    other = {"server", "date", "connection", "keep-alive", *(["accept-ranges"] if answer.status == 206 else [])}
    fields = {name.lower(): value for name, value in answer.headers.items() if name.lower() not in other}
    return answer.status, answer.body, fields


def test_nginx_sends_what_harmonia_has_verified(server: Server, info: PathInfo, tmp_path: Path) -> None:
    with behind_nginx(server, tmp_path) as front:
        server.get(file_url(info), {"Range": "bytes=0-0"})
        wait_until(lambda: files(server))
        whole, sent = front.get(file_url(info)), front.get(file_url(info))
    assert front.from_files == [f"GET 200 {len(sent.body)}"]
    assert len(unpacked(sent.body)) == info.nar_size
    assert visible(sent) == visible(whole)


def test_range_is_the_same_from_nginx(server: Server, info: PathInfo, tmp_path: Path) -> None:
    """Only ranges that nginx reads as Harmonia does are left to nginx."""
    verified(server, info)
    left = ("0-99", "1000-", "-100", "1048576-1048999", "5-9999999999")
    others = (f"{1 << 40}-", f"5-{1 << 64}", "0-1,5-6", "9-5", "0-9,", "nonsense")
    with behind_nginx(server, tmp_path) as front:
        for part in (*left, *others):
            asked = {"Range": f"bytes={part}"}
            with case(part):
                answer = front.get(file_url(info), asked)
                assert visible(answer) == visible(server.get(file_url(info), asked))
    sizes = [len(server.get(file_url(info), {"Range": f"bytes={part}"}).body) for part in left]
    assert front.from_files == [f"GET 206 {size}" for size in sizes]


def test_harmonia_answers_conditional_requests(server: Server, info: PathInfo, tmp_path: Path) -> None:
    verified(server, info)
    conditions = {
        "If-None-Match": "*",
        "If-Match": "*",
        "If-Range": '"other"',
        "If-Modified-Since": "Fri, 01 Jan 2100 00:00:00 GMT",
    }
    with behind_nginx(server, tmp_path) as front:
        for name, value in conditions.items():
            asked = {name: value, "Range": "bytes=5-9"}
            with case(name):
                assert visible(front.get(file_url(info), asked)) == visible(server.get(file_url(info), asked))
        assert visible(front.head(file_url(info))) == visible(server.head(file_url(info)))
    assert front.from_files == []


def test_only_a_trusted_proxy_gets_the_name_of_a_file(start: Start, info: PathInfo, tmp_path: Path) -> None:
    server = start(store=tmp_path / "store", settings=SETTINGS.replace("127.0.0.1", "192.0.2.1"))
    whole = verified(server, info)
    asked = {"X-Sendfile-Type": "X-Accel-Redirect"}
    assert visible(server.get(file_url(info), asked)) == visible(whole)


def test_client_cannot_request_a_file_by_its_name(server: Server, info: PathInfo, tmp_path: Path) -> None:
    verified(server, info)
    [file] = files(server)
    with behind_nginx(server, tmp_path) as front:
        assert front.get(f"/harmonia-nar/{file.name}").status == 404
    assert front.from_files == []


@pytest.mark.parametrize("status", [404, 403])
def test_harmonia_sends_what_nginx_cannot_open(server: Server, info: PathInfo, tmp_path: Path, status: int) -> None:
    """A file may be evicted between the response of Harmonia and the `open` of nginx."""
    whole = verified(server, info)
    [file] = files(server)
    other = tmp_path / "other" / "nar"
    other.mkdir(parents=True)
    if status == 403:
        (other / file.name).symlink_to(other / file.name)
    asked = {"Range": "bytes=5-9"}
    with behind_nginx(server, tmp_path, tmp_path / "other") as front:
        assert visible(front.get(file_url(info))) == visible(whole)
        answer = front.get(file_url(info), asked | {"X-Sendfile-Type": "X-Accel-Redirect"})
        assert visible(answer) == visible(server.get(file_url(info), asked))
    assert front.from_files == []


def test_each_request_is_checked(start: Start, store: StoreBuilder, info: PathInfo, tmp_path: Path) -> None:
    secret, token = new("laptop", ["read"])
    (tmp_path / "tokens").write_text(f"{token}\n")
    (tmp_path / "tokens").chmod(0o600)
    server = start(store=tmp_path / "store", settings=f"tokens_path = '{tmp_path}/tokens'\n{SETTINGS}")
    asked = {"Authorization": f"Bearer {secret}"}
    whole = verified(server, info, asked)
    with behind_nginx(server, tmp_path) as front:
        assert visible(front.get(file_url(info), asked)) == visible(whole)
        assert front.get(file_url(info)).status == 401
        store.delete(info.path)
        assert front.get(file_url(info), asked).status == 404
    assert len(front.from_files) == 1


def test_damaged_file_is_not_sent_before_it_is_verified(server: Server, info: PathInfo, tmp_path: Path) -> None:
    with behind_nginx(server, tmp_path) as front:
        server.get(file_url(info), {"Range": "bytes=0-0"})
        wait_until(lambda: files(server))
        flip(files(server)[0], 100)
        assert front.get(file_url(info)).status == 503
        whole = verified(server, info)
        assert front.get(file_url(info)).body == whole.body
    assert front.from_files == [f"GET 200 {len(whole.body)}"]


def test_cached_file_is_exactly_what_is_sent(server: Server, info: PathInfo) -> None:
    whole = verified(server, info).body
    [file] = files(server)
    assert file.read_bytes() == whole
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o644, 0o711)


def test_eviction_removes_the_digests_too(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    infos = [store.add(store.output_path(f"path-{n}"), Random(n).randbytes(SIZE)) for n in range(8)]
    server = start(store=tmp_path / "store", settings=f"cache_size = '5M'\n{SETTINGS}")

    def is_tidy() -> bool:
        names, contents = set(os.listdir(server.cache_dir / "nar")), {file.name for file in files(server)}
        return 0 < len(contents) < len(infos) and names == contents | {f"{name}.sums" for name in contents}

    for each in infos:
        server.get(file_url(each))
    wait_until(is_tidy)


def test_bytes_that_nginx_sends_are_counted(server: Server, info: PathInfo, tmp_path: Path) -> None:
    verified(server, info)

    def counted(metric: str, label: str) -> float:
        lines = server.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(metric) and label in line)

    sent = "harmonia_sent_bytes_total{", 'route="nar"'
    before = counted(*sent)
    with behind_nginx(server, tmp_path) as front:
        answers = [front.get(file_url(info)), front.get(file_url(info), {"Range": "bytes=5-104"})]
    assert len(front.from_files) == 2
    assert counted(*sent) - before == sum(len(answer.body) for answer in answers)
    assert counted("harmonia_requests_total{", 'route="nar",status="206"') == 1
    server.wait_for_log(" 206 100 ")


def test_setting_can_be_switched_over_a_cache_that_has_files(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    one, other = (store.add(store.output_path(f"path-{n}"), Random(n).randbytes(SIZE)) for n in range(2))
    bodies: dict[object, bytes] = {}
    for settings, path, fills in ((SETTINGS, one, 1), ("", one, 0), ("", other, 1), (SETTINGS, other, 0)):
        server = start(store=tmp_path / "store", settings=settings, cache_dir=tmp_path / "cache")
        body = verified(server, path).body
        assert bodies.setdefault(path.path, body) == body
        wait_until(lambda: not list((tmp_path / "cache" / "nar").glob("*.growing")))
        assert f"harmonia_cache_fills_total {float(fills)}\n" in server.get("/metrics").text
        server.stop()


@pytest.mark.nix
def test_nix_copies_what_nginx_sends(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    key = SecretKey.generate("cache-1")
    info = store.add(store.output_path("big"), {"big": Random(1).randbytes(SIZE)}, keys=[key])
    server = start(store=tmp_path / "store", settings=SETTINGS)
    whole = verified(server, info)
    client = Client(NIXES[0], tmp_path / "client")
    client.settings |= {"trusted-public-keys": str(key.public_key)}
    path = f"{store.store_dir}/{info.path}"
    with behind_nginx(server, tmp_path) as front:
        client.run("nix", "copy", "--from", front.url, path)
    assert front.from_files == [f"GET 200 {len(whole.body)}"]
    client.run("nix-store", "--verify-path", path)

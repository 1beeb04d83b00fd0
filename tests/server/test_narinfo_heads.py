"""A narinfo, or its 404, that is sent without Sanic is identical, byte for byte, to the response of the handler."""

import re
import signal
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import pytest

from harmonia.config.tokens import new
from harmonia.nix.signing import SecretKey
from harmonia.tools.store_builder import StoreBuilder
from support.lean_responses import COUNTING, WITHOUT, Client, count, text
from support.running import Server, case, patched, wait_until

Start = Callable[..., Server]

SETTINGS = "debug_info = false\naccess_log = false\n"
ABSENT = "0123456789abcdfghijklmnpqrsvwxyz"
FIELDS: Sequence[Sequence[str]] = [
    [],
    ["User-Agent: curl/8.5.0 Nix/2.34.1", "Accept: */*", "Accept-Encoding: zstd, br, gzip, deflate, bzip2, xz"],
    ["Accept: text/html"],
    ["Accept: text/html;q=0.5, text/plain"],
    ["accept: application/json"],
    ["Accept-Encoding: zstd"],
    ["Range: bytes=0-3"],
    ["Range: bytes=0-3", 'If-Range: "x"'],
    ["If-None-Match: *"],
    ['If-None-Match: "x"'],
    ['If-Match: "x"'],
    ["If-Match: *"],
    ["If-Modified-Since: Sun, 06 Nov 2044 08:49:37 GMT"],
    ["Via: 1.1 harmonia-other"],
    ["Via: 1.1 nginx"],
    ["Connection: keep-alive"],
    ["Connection: close"],
    ["Connection: upgrade", "Upgrade: h2c"],
    ["Content-Length: 0"],
    ["Expect: 100-continue"],
    ["Authorization: Bearer secret"],
    ["Cookie: a=b"],
    ["X-Forwarded-For: 192.0.2.1"],
    ["Host: another"],  # the second one
    ["Bad field"],
    [" Folded: line"],
]
TARGETS = (
    "/{}.narinfo",
    "//{}.narinfo",
    "/{}.narinfo?json",
    "/{}.narinfo?",
    "/{}.ls",
    "/x{}.narinfo",
    "/{}.narinfo/",
    "/%30{}.narinfo",
    "http://cache/{}.narinfo",
)


@pytest.fixture
def store(tmp_path: Path) -> StoreBuilder:
    """Build a store with a few paths, of which one has many references."""
    store = StoreBuilder(tmp_path / "store")
    leaves = [store.add_source(f"leaf-{number}", b"x" * number).path for number in range(30)]
    store.add(
        store.output_path("top"), b"", references=leaves, deriver=store.output_path("top.drv"), keys=[KEY], sigs=["bad"]
    )
    return store


KEY = SecretKey.generate("stored-1")


def hash_parts(store: StoreBuilder) -> list[str]:
    with store.connect() as database:
        return [path.rpartition("/")[2][:32] for (path,) in database.execute("select path from ValidPaths order by id")]


@pytest.mark.parametrize("settings", ["nar_compression = 'none'", "nar_compression = 'zstd'"])
def test_response_is_identical_for_each_kind_of_request(
    start: Start, store: StoreBuilder, tmp_path: Path, settings: str
) -> None:
    key = tmp_path / "key"
    key.write_text(SecretKey.generate("own-1").export())
    key.chmod(0o600)
    settings = f"{SETTINGS}{settings}\nsign_key_paths = ['{key}']"
    lean, full = (
        start(store=tmp_path / "store", settings=settings, program=program) for program in (COUNTING, WITHOUT)
    )
    clients = Client(lean), Client(full)
    asked = [*hash_parts(store)[-3:], ABSENT, ABSENT[::-1]]

    def same(request: str) -> None:
        with case(request):
            ours, expected = (client.ask(request) for client in clients)
            ours, expected = (re.sub(rb"harmonia-[0-9a-z]+", b"", each) for each in (ours, expected))
            assert ours == expected
            assert expected.startswith(b"HTTP/1.1 ")

    for fields, method, hash_part in product(FIELDS, ("GET", "HEAD"), (*asked, *asked)):
        same(text(method, f"/{hash_part}.narinfo", fields))
    assert count(lean) > 200
    for target, hash_part in product(TARGETS, asked):
        same(text("GET", target.format(hash_part), []))
    for hash_part in (ABSENT.upper(), ABSENT.replace("z", "u"), ABSENT.replace("z", "%7a"), ABSENT[1:]):
        same(text("GET", f"/{hash_part}.narinfo", []))
    for version in ("1.0", "1.0", "1.2", "1.2"):
        same(text("GET", f"/{asked[0]}.narinfo", [], version))
    for method in ("POST", "get", "OPTIONS", "QUERY"):
        same(text(method, f"/{asked[0]}.narinfo", []))
    for client in clients:
        client.close()


def test_requests_that_need_a_check_go_to_the_handler(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    (tmp_path / "roots").mkdir()
    for status, settings in ((200, "access_log = true"), (404, f"[publish]\ngc_roots = ['{tmp_path}/roots']")):
        server = start(store=tmp_path / "store", settings=f"debug_info = false\n{settings}", program=COUNTING)
        client = Client(server)
        for hash_part in hash_parts(store):
            assert client.ask(text("GET", f"/{hash_part}.narinfo", [])).startswith(b"HTTP/1.1 %d" % status)
        assert count(server) == 0
        client.close()


@pytest.mark.parametrize(
    ("method", "form"),
    [
        ("GET", "/{}.narinfo"),
        ("GET", "/push/{}.narinfo"),
        ("HEAD", "/push/nar/{}0123456789abcdfghijk.nar.zst"),  # by which Nix looks for a file that it may upload
    ],
)
def test_requests_with_a_valid_token_are_answered_without_sanic_until_tokens_are_reloaded(
    start: Start, store: StoreBuilder, tmp_path: Path, method: str, form: str
) -> None:
    scopes = ("push",) if "push" in form else ("read",)
    tokens = [new(name, scopes) for name in ("one", "two")]
    file = tmp_path / "tokens"
    file.write_text("\n".join(str(token) for _, token in tokens))
    pushing = "[push]\nenable = true\nallow_without_tls = true\n" if "push" in form else ""
    state = f"state_dir = '{tmp_path}/state'\n" if pushing else ""
    settings = f"{SETTINGS}tokens_path = '{file}'\ndaemon_socket = '{tmp_path}/none'\n{pushing}{state}"
    lean, full = (
        start(store=tmp_path / "store", settings=settings, program=program) for program in (COUNTING, WITHOUT)
    )
    asked = [*hash_parts(store)[-3:], ABSENT, ABSENT[::-1]]
    clients = Client(lean), Client(full)

    def answers(secret: str, fields: Sequence[str] = ()) -> list[bytes]:
        """Return the responses, which are the same with and without Sanic."""
        responses = []
        for hash_part in asked:
            request = text(method, form.format(hash_part), [f"Authorization: Bearer {secret}", *fields])
            response, expected = (client.ask(request) for client in clients)
            assert response == expected
            responses.append(response)
        return responses

    for secret, _ in tokens:
        before = count(lean)
        first = answers(secret)
        assert answers(secret) == first
        assert count(lean) > before + len(asked)
    before = count(lean)
    assert all(b" 401 " in answer for answer in answers("harmonia_wrong") + answers("harmonia_wrong"))
    assert count(lean) == before
    file.write_text(str(tokens[1][1]))
    for server in (lean, full):
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_log("tokens reloaded")
    assert all(b" 401 " in answer for answer in answers(tokens[0][0]))
    assert count(lean) == before
    assert answers(tokens[1][0]) == first
    assert count(lean) > before
    for client in clients:
        client.close()


def test_first_request_for_each_path_is_counted_and_answered_without_sanic(
    start: Start, store: StoreBuilder, tmp_path: Path
) -> None:
    server = start(store=tmp_path / "store", settings=SETTINGS, program=COUNTING)
    asked = hash_parts(store)
    client = Client(server)
    sizes = []
    for hash_part in asked:
        head, _, body = client.ask(text("GET", f"/{hash_part}.narinfo", [])).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert hash_part in body.decode()
        sizes.append(len(body))
    wait_until(lambda: count(server) == len(asked) - 1)
    for number in range(10):
        assert client.ask(text("GET", f"/{number:032}.narinfo", [])).startswith(b"HTTP/1.1 404 ")
    client.close()
    assert count(server) == len(asked) - 1 + 9
    metrics = server.get("/metrics").text
    assert f'harmonia_requests_total{{route="narinfo",status="200"}} {len(asked)}.0\n' in metrics
    assert 'harmonia_requests_total{route="narinfo",status="404"} 10.0\n' in metrics
    for outcome, answers, sent in (("store", len(asked), sum(sizes)), ("none", 10, 100)):
        labels = f'outcome="{outcome}",route="narinfo"'
        assert f"harmonia_head_seconds_count{{{labels}}} {answers}.0\n" in metrics
        assert f"harmonia_sent_bytes_total{{{labels}}} {float(sent)}\n" in metrics


def test_first_request_of_a_connection_is_answered_without_sanic(
    start: Start, store: StoreBuilder, tmp_path: Path
) -> None:
    server = start(store=tmp_path / "store", settings=SETTINGS, program=COUNTING)
    hash_part = hash_parts(store)[0]
    for _ in range(20):
        client = Client(server)
        for _ in range(2):
            assert client.ask(text("GET", f"/{hash_part}.narinfo", [])).startswith(b"HTTP/1.1 200 ")
        client.close()
    assert count(server) == 39


def test_kinds_of_requests_are_bounded(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    program = patched("from harmonia.server.http import response_cache; response_cache._MAX_KINDS_BYTES = 5_000")
    server = start(store=tmp_path / "store", settings=SETTINGS, program=program)
    hash_part = hash_parts(store)[0]
    client = Client(server)
    for number in range(200):
        for _ in range(2):
            assert client.ask(text("GET", f"/{hash_part}.narinfo", [f"X: {number}"])).startswith(b"HTTP/1.1 200 ")
    for _ in range(3):
        assert client.ask(text("GET", f"/{hash_part}.narinfo", [f"X: {'x' * 6000}"])).startswith(b"HTTP/1.1 200 ")
    client.close()
    assert not [line for line in server.log if "Traceback" in line]

"""The access log: each line is true, and no client can forge one."""

import http.client
import json
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from urllib.parse import quote
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harmonia.cli import serve
from harmonia.config import loader
from harmonia.config.tokens import new
from support.pages import ROOT
from support.running import HARMONIA, Sample, Server, download, nar_url, patched, read_answer, wait_until

Start = Callable[..., Server]

ON = "access_log = true"
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d [A-Z]+ ")
LINE = re.compile(
    r"\S+ INFO (?P<client>\S+) '(?P<request>\S+ \S+)' (?P<status>\d{3}) (?P<sent>\d+) (?P<time>\d+\.\d)ms "
    r"(?P<agent>'.*'|\".*\") route=(?P<route>\w+) outcome=\w+ first_byte=\d+\.\dms"
    r"(?P<left> client_left)?\n"
)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return Sample.make(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def proxied(sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start a server, shared by many tests, that trusts this machine and a network."""
    directory = tmp_path_factory.mktemp("proxied") / "server"
    server = Server(directory, sample.root, f"{ON}\ntrusted_proxies = ['127.0.0.1', '10.0.0.0/8']")
    server.start()
    yield server
    assert server.stop() == 0


@dataclass(frozen=True)
class Entry:
    client: str
    request: str
    status: int
    sent: int
    agent: str


def entries(server: Server) -> list[Entry]:
    """Return the entries of the access log, without the requests that waited for the start."""
    found = [match for line in list(server.log) if (match := LINE.fullmatch(line))]
    parsed = [
        Entry(match["client"], match["request"], int(match["status"]), int(match["sent"]), match["agent"])
        for match in found
    ]
    return [entry for entry in parsed if entry.request != "GET /version"]


def entry(server: Server, url: str) -> Entry:
    """Return the last entry for this URL."""
    wait_until(lambda: any(url in each.request for each in entries(server)))
    return [each for each in entries(server) if url in each.request][-1]


def client(server: Server, headers: Mapping[str, str]) -> str:
    """Return the client address that is logged for a request with these headers."""
    url = f"/health?{uuid4()}"
    server.get(url, headers)
    return entry(server, url).client


def test_access_log_is_off_by_default(start: Start, sample: Sample) -> None:
    server = start(store=sample.root)
    assert server.get("/nix-cache-info").status == 200
    assert server.stop() == 0
    assert len(server.log) == 3, server.log  # overview, start and stop


@pytest.mark.parametrize("url", ["/nix-cache-info", "/none?a=%20b", "/%e2%98%83/../x", "//etc//passwd"])
def test_request_is_logged_as_one_line(proxied: Server, url: str) -> None:
    answer = proxied.get(url, {"User-Agent": "curl/8"})
    assert entry(proxied, url) == Entry("127.0.0.1", f"GET {url}", answer.status, len(answer.body), "'curl/8'")


def test_download_is_logged_with_bytes_and_duration(proxied: Server, sample: Sample) -> None:
    url = f"{nar_url(sample.big)}?whole"
    with proxied.connect() as connection:
        connection.sendall(f"GET {url} HTTP/1.1\r\nHost: cache\r\n\r\n".encode())
        read_answer(connection)
        line = proxied.wait_for_log(rf"{re.escape(url)}' 200 (\d+) (\d+\.\d)ms")
    assert int(line[1]) == sample.big.nar_size
    assert float(line[2]) > 1


@pytest.mark.parametrize("big", [False, True])
def test_head_is_logged_with_0_bytes(proxied: Server, sample: Sample, *, big: bool) -> None:
    url = f"{nar_url(sample.big) if big else '/nix-cache-info'}?head"
    proxied.head(url)
    assert entry(proxied, url) == Entry("127.0.0.1", f"HEAD {url}", 200, 0, "'-'")


def test_304_is_logged_with_0_bytes(proxied: Server, sample: Sample) -> None:
    url = f"{nar_url(sample.big)}?unmodified"
    proxied.get(url, {"If-None-Match": "*"})
    assert (entry(proxied, url).status, entry(proxied, url).sent) == (304, 0)


def test_transfer_broken_off_by_the_server_is_logged_with_the_sent_bytes(start: Start, tmp_path: Path) -> None:
    sample = Sample.make(tmp_path)
    server = start(store=sample.root, settings=ON)
    with download(server, sample.big) as response:
        os.truncate(sample.root / "nix/store" / str(sample.big.path), 1000)
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            response.read()
    assert entry(server, nar_url(sample.big)).status == 200
    assert 0 < entry(server, nar_url(sample.big)).sent < sample.big.nar_size


def test_transfer_broken_off_by_the_client_is_logged_with_the_sent_bytes(start: Start, sample: Sample) -> None:
    server = start(store=sample.root, settings=ON)
    with server.connect(receive_buffer=8192) as connection:
        connection.sendall(f"GET {nar_url(sample.big)} HTTP/1.1\r\nHost: cache\r\n\r\n".encode())
        connection.recv(100_000)
    server.get("/health")
    wait_until(lambda: len(entries(server)) >= 2)  # in any order
    broken, _ = sorted(entries(server), key=lambda entry: entry.request == "GET /health")
    assert broken.status == 200
    assert 0 < broken.sent < sample.big.nar_size


@pytest.mark.parametrize("trusted", [[], ["10.0.0.0/8", "unix"]])
def test_x_forwarded_for_of_an_untrusted_peer_is_ignored(start: Start, sample: Sample, trusted: list[str]) -> None:
    server = start(store=sample.root, settings=f"{ON}\ntrusted_proxies = {trusted!r}")
    assert client(server, {"X-Forwarded-For": "203.0.113.9"}) == "127.0.0.1"


@pytest.mark.parametrize(
    ("forwarded", "logged"),
    [
        ("203.0.113.9", "203.0.113.9"),
        ("2001:db8::9", "2001:db8::9"),
        ("6.6.6.6, 203.0.113.9", "203.0.113.9"),
        ("6.6.6.6,203.0.113.9,10.1.1.1 ,\t10.2.2.2", "203.0.113.9"),
        ("10.3.3.3, 10.1.1.1", "10.3.3.3"),
        ("203.0.113.9, ::ffff:10.1.1.1", "203.0.113.9"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
        ("", "127.0.0.1"),
        ("unknown", "127.0.0.1"),
        ("unix", "127.0.0.1"),
        ("203.0.113.9, a b\x9b31m' 200", "127.0.0.1"),
        ("fe80::9%a b\x9b31m", "fe80::9"),
        ("203.0.113.9, garbage, 10.1.1.1", "10.1.1.1"),
    ],
)
def test_client_is_the_last_untrusted_address_in_x_forwarded_for(proxied: Server, forwarded: str, logged: str) -> None:
    assert client(proxied, {"X-Forwarded-For": forwarded}) == logged


def test_several_x_forwarded_for_headers_are_one_list(proxied: Server) -> None:
    with proxied.connect() as connection:
        lines = ["GET /health?two HTTP/1.1", "Host: cache", "X-Forwarded-For: 203.0.113.9", "X-Forwarded-For: 10.1.1.1"]
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        read_answer(connection)
    assert entry(proxied, "/health?two").client == "203.0.113.9"


def test_ipv4_proxy_is_trusted_on_a_dual_stack_socket(start: Start, sample: Sample) -> None:
    server = start(store=sample.root, bind="[::]:0", settings=f"{ON}\ntrusted_proxies = ['127.0.0.1']")
    server.url = server.url.replace("localhost", "127.0.0.1")
    assert client(server, {"X-Forwarded-For": "203.0.113.9"}) == "203.0.113.9"


def test_ipv4_client_is_logged_as_ipv4_on_a_dual_stack_socket(start: Start, sample: Sample) -> None:
    server = start(store=sample.root, bind="[::]:0", settings=ON)
    server.url = server.url.replace("localhost", "127.0.0.1")
    assert client(server, {}) == "127.0.0.1"


@pytest.mark.parametrize(("trusted", "logged"), [(["127.0.0.1"], "unix"), (["unix"], "203.0.113.9")])
def test_peers_on_a_unix_socket_are_trusted_only_as_unix(
    start: Start, sample: Sample, tmp_path: Path, trusted: list[str], logged: str
) -> None:
    server = start(store=sample.root, bind=f"unix:{tmp_path}/s", settings=f"{ON}\ntrusted_proxies = {trusted!r}")
    assert client(server, {"X-Forwarded-For": "203.0.113.9"}) == logged


FORGED = b"\n2026-01-01 00:00:00,000 INFO 203.0.113.9 'GET /forged' 200 0 0.1ms 'x'\x1b[2J\r\x85\xe2\x80\xa8"


@pytest.mark.parametrize(
    "request_head",
    [
        b"GET /x" + FORGED.replace(b" ", b"\t") + b" HTTP/1.1\r\nHost: cache\r\n\r\n",
        b"GET /x" + FORGED.replace(b" ", b"\t")[:-4] + b" HTTP/1.1\r\nHost: cache\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: cache\r\nUser-Agent: a" + FORGED + b"\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: cache\r\nX-Forwarded-For: a" + FORGED + b"\r\n\r\n",
        b"GE\x1b" + FORGED.replace(b" ", b"\t") + b" /x HTTP/1.1\r\nHost: cache\r\n\r\n",
        b"garbage" + FORGED + b"\r\n\r\n",
    ],
    ids=["url", "ascii url", "agent", "forwarded", "method", "no request"],
)
def test_client_cannot_forge_a_log_line(proxied: Server, request_head: bytes) -> None:
    with proxied.connect() as connection:
        connection.sendall(request_head)
        connection.recv(4096)
    client(proxied, {})  # earlier lines are in the log now
    lines = list(proxied.log)
    assert all(line[:-1].isprintable() for line in lines), lines
    assert all(TIME.match(line) for line in lines), lines


@pytest.fixture(scope="module", params=["text", "json"])
def verbose(
    request: pytest.FixtureRequest, sample: Sample, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Start a server that logs each request, and each decision about it."""
    settings = f"{ON}\ntrusted_proxies = ['127.0.0.1']\nlog_level = 'debug'\nlog_format = '{request.param}'"
    server = Server(tmp_path_factory.mktemp("verbose") / "server", sample.root, settings)
    server.start()
    yield server
    assert server.stop() == 0


FIELDS = (b"User-Agent", b"X-Forwarded-For", b"X-Request-ID", b"Authorization", b"Range", b"If-None-Match", b"Via")


@settings(max_examples=50, deadline=None)
@given(
    target=st.binary(max_size=20),
    sent=st.lists(st.tuples(st.sampled_from(FIELDS), st.binary(max_size=40)), max_size=4),
    encoded=st.booleans(),
)
def test_no_bytes_of_a_request_reach_the_log_as_control_characters(
    verbose: Server, target: bytes, sent: list[tuple[bytes, bytes]], *, encoded: bool
) -> None:
    path = quote(target).encode() if encoded else target
    lines = [b"GET /serve/" + path + b" HTTP/1.1", b"Host: cache", b"Connection: close"]
    with verbose.connect() as connection:
        connection.sendall(b"\r\n".join([*lines, *(b": ".join(field) for field in sent), b"", b""]))
        connection.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            while connection.recv(4096):
                pass
    before = len(verbose.log)
    verbose.get("/health")
    wait_until(lambda: any("/health" in line for line in verbose.log[before:]))
    for line in list(verbose.log):
        assert line[:-1].isprintable()
        if verbose.log[0][0] == "{":
            assert line.startswith('{"time": "')
            assert "\n".join(map(str, json.loads(line).values())).encode()  # Rust's parser rejects lone surrogates
        else:
            assert TIME.match(line)


def in_the_journal(program: Sequence[str]) -> list[str]:
    """Return the program with a JOURNAL_STREAM that names its stderr, as systemd sets it."""
    return ["sh", "-c", 'JOURNAL_STREAM=$(stat -L -c %d:%i /dev/stderr) exec "$@"', "sh", *program]


def test_journal_lines_have_priorities(start: Start, sample: Sample) -> None:
    server = start(store=sample.root, settings=ON, program=in_the_journal(HARMONIA))
    server.get("/health")
    server.wait_for_log("^<6>INFO 127.0.0.1 'GET /health' 200")
    assert server.stop() == 0
    assert all(line.startswith("<6>INFO ") for line in server.log), server.log


def test_journal_stream_of_another_file_is_ignored(start: Start, sample: Sample) -> None:
    server = start(store=sample.root, settings=ON, environment={"JOURNAL_STREAM": "8:1"})
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d INFO serving ", server.log[0])


def test_traceback_is_one_journal_entry(sample: Sample, tmp_path: Path) -> None:
    fail = "from harmonia.server import worker\ndef fail(*_): raise RuntimeError('no\\nluck')\nworker.run = fail"
    server = Server(tmp_path / "server", sample.root, program=in_the_journal(patched(fail)))
    server.launch()
    assert server.wait() == 1
    assert [line[:3] for line in server.log] == ["<6>", "<6>", "<2>", "<3>", "<2>"], server.log
    assert "RuntimeError: no | luck" in server.log[2]


def test_json_lines_have_documented_fields(start: Start, sample: Sample, tmp_path: Path) -> None:
    secret, token = new("ci", ("read",))
    (tmp_path / "tokens").write_text(f"{token}\n")
    server = start(store=sample.root, settings=f"{ON}\nlog_format = 'json'\ntokens_path = '{tmp_path}/tokens'")
    url = f"{nar_url(sample.small)}?json"
    server.get(url, {"Authorization": f"Bearer {secret}", "User-Agent": 'a"\u00e9', "X-Request-ID": "7f3a"})
    wait_until(lambda: any("?json" in line for line in server.log))
    events = [json.loads(line) for line in server.log]
    assert all(list(event)[:3] == ["time", "level", "logger"] for event in events)
    assert all(datetime.fromisoformat(event["time"]).tzinfo for event in events)
    [event] = [event for event in events if "?json" in event.get("url", "")]
    assert (event["client"], event["method"], event["route"], event["status"]) == ("127.0.0.1", "GET", "nar", 200)
    assert (event["sent"], event["token"]) == (sample.small.nar_size, "ci")
    assert (event["outcome"], event["request_id"]) == ("store", "7f3a")
    assert 0 < event["first_byte_seconds"] <= event["seconds"] < 60
    page = (ROOT / "docs/reference/service.md").read_text()
    rows = re.findall(r"^\| (`.*?) \|", page.partition("### Fields")[2].partition("\n#")[0], re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert documented == set(event) | {"message", "client_left"}


def test_start_line_names_what_is_served(start: Start, sample: Sample) -> None:
    server = start(store=sample.root, settings="[[upstream]]\nurl = 'https://far.example'\npriority = 1", workers=2)
    assert "2 workers; signs nothing; cache " in server.log[1]
    assert "; upstreams https://far.example; everyone may read" in server.log[1]


@pytest.mark.parametrize(
    ("text", "needs"),
    [
        ("tokens_path = 'tokens'", "readers need a token"),
        ("tokens_path = 'tokens'\nanonymous_scopes = ['read']", "everyone may read"),
        ("tokens_path = 'tokens'\nanonymous_scopes = ['metrics']", "readers need a token"),
        ("tls_client_ca_path = 'ca'", "readers need a client certificate"),
        ("tokens_path = 'tokens'\ntls_client_ca_path = 'ca'", "readers need a client certificate and a token"),
    ],
)
def test_start_line_names_what_readers_need(text: str, needs: str) -> None:
    tls = "tls_cert_path = 'cert'\ntls_key_path = 'key'\n" if "tls" in text else ""
    assert [*serve._overview(loader.parse(tls + text, "given", {}), [])][-1] == needs  # noqa: SLF001 (a private part is tested)


def test_start_line_names_the_bucket() -> None:
    text = "[mirror]\nendpoint = 'https://s3.example'\nbucket = 'nix'"
    for read, named in (("true", True), ("false", False)):
        parts = [*serve._overview(loader.parse(f"{text}\nread = {read}", "given", {}), [])]  # noqa: SLF001 (a private part is tested)
        assert ("bucket https://s3.example/nix" in parts) is named

"""Private caches: without a token every response is alike, each token grants its scopes only, secrets are not shown."""

import base64
import gc
import math
import os
import re
import signal
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from harmonia.config.settings import Settings
from harmonia.config.tokens import SCOPES, Tokens, new
from harmonia.metrics.shared_counters import TokenUses
from harmonia.nix.signing import SecretKey
from harmonia.process.preflight import load
from harmonia.server.http.auth import Guard
from support.contract import ROWS, Row, stock
from support.preloaded import NOT_PRELOADED
from support.running import FROZEN_RATES, Answer, Server, Session, case, patched, run, wait_until

if TYPE_CHECKING:
    from sanic import Request

Start = Callable[..., Server]

TOKENS = {name: new(name, [name]) for name in SCOPES} | {"all": new("all", SCOPES)}
FILE = "\n".join(str(token) for _, token in TOKENS.values())
OPEN = ("/version", "/health", "/health?verbose", "/robots.txt", "/favicon.ico")
BASE = "browse = true\naccess_log = true\nlog_level = 'debug'\n"


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {TOKENS[name][0]}"}


def basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"}


@pytest.fixture(scope="module")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    directory = tmp_path_factory.mktemp("private")
    (directory / "tokens").write_text(FILE)
    return directory, stock(directory / "store")


@pytest.fixture(scope="module")
def server(stocked: tuple[Path, dict[str, str]]) -> Iterator[Server]:
    directory, _ = stocked
    server = Server(
        directory / "server",
        directory / "store",
        f"{BASE}tokens_path = '{directory}/tokens'\nmax_failed_auth_rate = 0",
        program=NOT_PRELOADED,  # a test reads its /proc/PID/cmdline and environ
    )
    server.start()
    yield server
    assert server.stop() == 0
    assert not [line for line in server.log if "Traceback" in line]


@pytest.fixture
def client(server: Server) -> Iterator[Session]:
    with Session(server) as session:
        yield session


@pytest.fixture(params=[row for rows in ROWS.values() for row in rows if not row.endless], ids=lambda row: row.path)
def row(request: pytest.FixtureRequest, stocked: tuple[Path, dict[str, str]]) -> Row:
    asked: Row = request.param
    return asked._replace(path=asked.path.format(**stocked[1]))


def scope(row: Row) -> str:
    if row.path.startswith(("/search", "/path/", "/diff/", "/sbom/", "/explain/", "/events")):
        return "browse"
    return "metrics" if row.path == "/metrics" else "read"


def is_refusal(answer: Answer) -> bool:
    assert answer.status in (401, 403)
    assert answer.text in ("Unauthorized\n", "Forbidden\n", "")
    assert answer.headers["cache-control"] == "no-store"
    challenge = answer.headers.get("www-authenticate", "")
    assert (answer.status == 401) == challenge.startswith('Basic realm="') == (", Bearer realm=" in challenge)
    return True


INVALID_CREDENTIALS = {
    "none": {},
    "invalid": {"Authorization": "Bearer harmonia_wrong"},
    "the hash": {"Authorization": f"Bearer {TOKENS['all'][1].sha256.hex()}"},
    "no token": {"Authorization": "Bearer"},
    "invalid basic": basic("all", "invalid"),
    "the token as the user": basic(TOKENS["all"][0], ""),
    "no base64": {"Authorization": "Basic ?"},
    "no UTF-8": {"Authorization": "Basic " + base64.b64encode(b"\xff\xfe").decode()},
    "another scheme": {"Authorization": f"Digest {TOKENS['all'][0]}"},
    "another header": {"X-Authorization": f"Bearer {TOKENS['all'][0]}"},
}


def test_without_a_valid_token_every_resource_answers_401(client: Session, row: Row) -> None:
    for invalid, headers in INVALID_CREDENTIALS.items():
        if row.path in OPEN:
            assert client.get(row.path, headers).status == 200
            continue
        for method in ("GET", "HEAD", "PUT", "POST"):
            with case(invalid, method):
                answer = client.request(method, row.path, headers)
                assert is_refusal(answer)
                assert (answer.status, answer.body) == (401, b"" if method == "HEAD" else b"Unauthorized\n")


def test_without_a_token_existing_and_missing_paths_get_identical_responses(
    server: Server, stocked: tuple[Path, dict[str, str]]
) -> None:
    existing = stocked[1]["hash"]
    paths = ["/none", "/nar", "/%00", "/nar/a/b", "/NIX-CACHE-INFO", "/x.narinfo"]
    for hash_part in (existing, "0" * 32):
        paths += [f"/{hash_part}.narinfo", f"/{hash_part}.ls", f"/nar/{hash_part}.nar", f"/serve/{hash_part}/"]
        paths += [f"/log/{hash_part}", f"/path/{hash_part}", f"/search?q={hash_part}"]
    for method in ("GET", "HEAD", "PUT"):
        answers = [server.request(method, path, {"If-None-Match": "*", "Range": "bytes=0-0"}) for path in paths]
        assert all(answer == answers[0] for answer in answers)
        assert answers[0].status == 401


def test_token_grants_only_its_scopes(client: Session, row: Row) -> None:
    for name in TOKENS:
        for headers in (bearer(name), basic("", TOKENS[name][0]), basic(name, TOKENS[name][0])):
            for method in ("GET", "HEAD"):
                with case(name, method, headers):
                    answer = client.request(method, row.path, headers)
                    if row.path in OPEN or name in ("all", scope(row)):
                        assert answer.status == row.status
                    else:
                        assert is_refusal(answer)
                        assert answer.status == 403


def test_405_and_404_need_a_token_with_the_scope(server: Server) -> None:
    assert server.request("PUT", "/nix-cache-info", bearer("read")).status == 405
    assert server.get("/none", bearer("read")).status == 404
    assert server.get("/none", bearer("metrics")).status == 403


def test_authorization_scheme_is_case_insensitive(server: Server) -> None:
    secret = TOKENS["read"][0]
    for scheme in ("bearer", "BEARER", "Bearer "):
        assert server.get("/nix-cache-info", {"Authorization": f"{scheme} {secret}"}).status == 200


def test_private_responses_are_not_publicly_cacheable(server: Server, row: Row) -> None:
    answer = server.get(row.path, bearer("all"))
    assert row.path in OPEN or "public" not in answer.headers["cache-control"]
    if etag := answer.headers.get("etag"):
        again = server.get(row.path, {**bearer("all"), "If-None-Match": etag})
        assert again.status == 304
        assert row.path in OPEN or "public" not in again.headers["cache-control"]


def test_secrets_are_in_no_log_metric_or_process_argument(server: Server) -> None:
    """Runs after the tests above, which make every kind of valid and invalid request."""
    for name in TOKENS:
        assert server.get("/nix-cache-info", basic("user", TOKENS[name][0])).status in (200, 403)
    server.get("/nix-cache-info", {"Authorization": "Bearer harmonia_wrong"})
    server.request("GET", "/nix-cache-info", bearer("all"), version="9.9")
    with server.connect() as connection:
        connection.sendall(f"GET http://[ HTTP/1.1\r\nAuthorization: Bearer {TOKENS['all'][0]}\r\n\r\n".encode())
        connection.recv(4096)
    metrics = server.get("/metrics", bearer("metrics")).text
    assert 'route="cache_info",status="401"' in metrics
    wait_until(lambda: any("/nix-cache-info" in line for line in server.log))
    settings = load(str(server.config), {})
    checked = run("--config", str(server.config), "check-config")
    processes = [server.process.pid, *server.workers]
    arguments = [Path(f"/proc/{pid}/{message}").read_text() for pid in processes for message in ("cmdline", "environ")]
    shown = "\n".join([*server.log, metrics, repr(settings), checked.stdout, checked.stderr, *arguments])
    for secret, token in TOKENS.values():
        encoded = basic("user", secret)["Authorization"].removeprefix("Basic ")
        for part in (secret, secret.removeprefix("harmonia_"), token.sha256.hex(), encoded):
            assert part not in shown
    assert "harmonia_wrong" not in shown


CRASH = """
import harmonia.server.resources.cache_info as resource
async def get(cache, request):
    raise RuntimeError(f"an internal error with {request!r}, {cache!r}")
get.__module__ = resource.__name__
resource.get = get
"""


def test_internal_error_logs_no_secret(start: Start, stocked: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    key = SecretKey.generate("test-1")
    (tmp_path / "key").write_text(key.export())
    settings = f"tokens_path = '{stocked[0]}/tokens'\nsign_key_paths = ['{tmp_path}/key']\nlog_level = 'debug'"
    server = start(store=stocked[0] / "store", settings=settings, program=["env", *patched(CRASH)])
    answer = server.get("/nix-cache-info", bearer("read"))
    assert (answer.status, answer.text) == (500, "Internal Server Error\n")
    server.stop()
    log = "".join(server.log)
    assert "RuntimeError: an internal error" in log
    for secret in (TOKENS["read"][0], key.export().partition(":")[2]):
        assert secret not in log


@pytest.mark.parametrize("anonymous", [["read"], ["read", "browse"], ["metrics"]])
def test_anonymous_scopes_need_no_token(
    start: Start, stocked: tuple[Path, dict[str, str]], anonymous: list[str]
) -> None:
    directory, hashes = stocked
    settings = f"{BASE}tokens_path = '{directory}/tokens'\nanonymous_scopes = {anonymous}"
    server = start(store=directory / "store", settings=settings)
    for rows in ROWS.values():
        path = rows[0].path.format(**hashes)
        answer = server.get(path)
        if path in OPEN or scope(rows[0]) in anonymous:
            assert answer.status == rows[0].status
            # An invalid token does not matter here: a client may send one meant for another cache.
            assert server.get(path, {"Authorization": "Bearer invalid"}) == answer or rows[0].live
        else:
            assert is_refusal(answer)
    assert server.get("/none").status == (404 if "read" in anonymous else 401)
    narinfo = server.get(f"/{hashes['hash']}.narinfo", bearer("read"))
    assert narinfo.headers["cache-control"].startswith("public" if "read" in anonymous else "private")


def test_anonymous_health_does_not_show_upstream_urls(
    start: Start, stocked: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    entry = "[[upstream]]\nurl = 'http://127.0.0.1:1/secret-place'\n"
    assert "secret-place" in start(store=stocked[0] / "store", settings=entry).get("/health?verbose").text
    (tmp_path / "tokens").write_text(FILE)
    server = start(store=stocked[0] / "store", settings=f"tokens_path = '{tmp_path}/tokens'\n{entry}")
    assert server.get("/health?verbose").text == "OK\n"


def test_server_without_tokens_serves_everyone(start: Start, stocked: tuple[Path, dict[str, str]]) -> None:
    directory, hashes = stocked
    server = start(store=directory / "store", settings="browse = true")
    for rows in ROWS.values():
        assert server.get(rows[0].path.format(**hashes)).status == rows[0].status


def test_metrics_bind_needs_no_token(start: Start, stocked: tuple[Path, dict[str, str]]) -> None:
    directory, _ = stocked
    settings = f"tokens_path = '{directory}/tokens'\nmetrics_bind = '127.0.0.1:0'"
    server = start(store=directory / "store", settings=settings)
    url = server.wait_for_log(r"metrics are at (\S+)/metrics")[1]
    assert server.get("/metrics", bearer("all")).status == 404
    server.url = url
    assert server.get("/metrics").status == 200


def test_sighup_reloads_tokens_and_keeps_them_if_the_file_is_broken(
    start: Start, stocked: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(str(TOKENS["read"][1]))
    server = start(store=stocked[0] / "store", settings=f"tokens_path = '{tokens}'", workers=2)

    def statuses(name: str) -> set[int]:
        return {server.get("/nix-cache-info", bearer(name)).status for _ in range(10)}

    assert (statuses("read"), statuses("all")) == ({200}, {401})
    tokens.write_text(str(TOKENS["all"][1]))
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: sum("INFO tokens reloaded" in line for line in server.log) == 2)
    assert (statuses("read"), statuses("all")) == ({401}, {200})
    tokens.write_text(f"broken {TOKENS['read'][0]}")
    server.process.send_signal(signal.SIGHUP)
    line = server.wait_for_log("ERROR token reload failed, .*line 1: expected NAME SCOPES HASH").string
    assert TOKENS["read"][0] not in line
    assert statuses("all") == {200}


def test_expired_token_gets_401_and_the_log_has_the_reason(
    start: Start, stocked: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    secret, token = new("late", ["read"], 1_000_000_000.0)
    other, valid = new("valid", ["read"], time.time() + 86400)
    tokens = tmp_path / "tokens"
    tokens.write_text(f"{token}\n{valid}\n")
    server = start(store=stocked[0] / "store", settings=f"tokens_path = '{tokens}'")

    def get(secret: str) -> Answer:
        return server.get("/nix-cache-info", {"Authorization": f"Bearer {secret}"})

    answers = [get(secret), get(secret)]
    assert all(is_refusal(answer) and answer.status == 401 for answer in answers)
    assert get(other).status == 200
    reason = "WARNING refused 127.0.0.1: token late expired at 2001-09-09"
    server.wait_for_log(reason)
    assert sum(reason in line for line in server.log) == 1  # a minute
    tokens.write_text(f"{replace(token, expires_at=time.time() + 86400)}")
    server.process.send_signal(signal.SIGHUP)
    server.wait_for_log("INFO tokens reloaded")
    assert get(secret).status == 200
    assert not [line for line in server.log if secret in line]


def test_token_that_expires_while_the_server_runs_gets_401(
    start: Start, stocked: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    secret, token = new("short", ["read", "browse"], math.ceil(time.time()) + 3)
    (tmp_path / "tokens").write_text(str(token))
    server = start(store=stocked[0] / "store", settings=f"browse = true\ntokens_path = '{tmp_path}/tokens'")
    headers = {"Authorization": f"Bearer {secret}"}
    with server.connect() as connection:
        connection.sendall(
            f"GET /events HTTP/1.1\r\nHost: cache\r\nAuthorization: Bearer {secret}\r\n"
            "Connection: close\r\n\r\n".encode()
        )
        assert connection.recv(12) in (b"HTTP/1.1 200", b"HTTP/1.1 401")  # 401 only on a machine that took 3 s
        wait_until(lambda: server.get("/nix-cache-info", headers).status == 401)
        assert time.time() >= token.expires_at
        while connection.recv(4096):  # the stream of events ends with its token
            pass


def test_old_tokens_are_valid_while_new_ones_are_read(
    start: Start, stocked: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    """A FIFO stands for a slow file: reads block until a process writes into it."""
    tokens = tmp_path / "tokens"
    tokens.write_text(str(TOKENS["read"][1]))
    server = start(store=stocked[0] / "store", settings=f"tokens_path = '{tokens}'")
    tokens.unlink()
    os.mkfifo(tokens)
    server.process.send_signal(signal.SIGHUP)
    with tokens.open("w") as file:  # blocks until the server opens it
        file.write(f"{TOKENS['all'][1]}\n")
        file.flush()
        for name, expected in (("read", 200), ("all", 401)):
            assert server.get("/nix-cache-info", bearer(name)).status == expected
    server.wait_for_log("INFO tokens reloaded")
    for name, expected in (("read", 401), ("all", 200)):
        assert server.get("/nix-cache-info", bearer(name)).status == expected


def test_invalid_tokens_are_rate_limited_and_valid_ones_are_not(
    start: Start, stocked: tuple[Path, dict[str, str]]
) -> None:
    settings = f"tokens_path = '{stocked[0]}/tokens'\nmax_failed_auth_rate = 5\ntrusted_proxies = ['127.0.0.1']"
    server = start(store=stocked[0] / "store", settings=settings, program=patched(FROZEN_RATES))

    def get(client: str, headers: dict[str, str]) -> Answer:
        return server.get("/nix-cache-info", {**headers, "X-Forwarded-For": client})

    invalid = {"Authorization": "Bearer invalid"}
    assert [get("10.0.0.1", {}).status for _ in range(20)] == [401] * 20  # no token, so no failed attempt
    assert [get("10.0.0.1", invalid).status for _ in range(7)] == [401] * 5 + [429] * 2
    late = get("10.0.0.1", invalid)
    assert late.text == "Too Many Requests\n"
    assert re.fullmatch("[1-9]|1[0-2]", late.headers["retry-after"])
    assert get("10.0.0.1", basic("x", "invalid")).status == 429
    assert server.get("/none", {**invalid, "X-Forwarded-For": "10.0.0.1"}).status == 429
    assert [get("10.0.0.1", bearer("read")).status for _ in range(20)] == [200] * 20
    assert get("10.0.0.1", {}).status == 401
    assert get("10.0.0.2", invalid).status == 401
    server.stop()
    assert [line.split(" ", 1)[1] for line in server.log if "invalid tokens" in line] == [
        "WARNING too many invalid tokens from 10.0.0.1: answered with 429; check that client's netrc\n"
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("anonymous_scopes = ['read']", "anonymous_scopes: set without tokens_path; "),
        (
            "tokens_path = 't'\nanonymous_scopes = ['upload']",
            'anonymous_scopes: expected an array of "read", "browse", "m',
        ),
        ("tls_client_ca_path = 'c'", "tls_client_ca_path: set without tls_cert_path; "),
        (f"tokens_path = '{TOKENS['all'][0]}'\nbind = [3]", "bind: expected"),
        (f"tokens_path = ['{TOKENS['all'][0]}']", "tokens_path: expected a string, found array (not shown)"),
    ],
    ids=lambda _: "setting",
)
def test_contradictory_access_settings_are_rejected(tmp_path: Path, settings: str, message: str) -> None:
    (tmp_path / "harmonia.toml").write_text(settings)
    checked = run("--config", str(tmp_path / "harmonia.toml"), "check-config")
    assert checked.returncode == 2
    assert message in checked.stderr
    assert TOKENS["all"][0] not in checked.stderr


def test_remembered_request_keeps_no_tokens_after_a_reload(tmp_path: Path) -> None:
    """Otherwise each reload would keep all old tokens in memory as long as a response that is repeated."""
    file = tmp_path / "tokens"
    file.write_text(FILE)
    # isinstance would read the class of weak proxies whose object is gone.
    others = [each for each in gc.get_objects() if type(each) is Tokens]
    guard = Guard(Settings(tokens_path=str(file)), TokenUses(memoryview(bytearray(8 * TokenUses.size)).cast("d")))
    request = cast("Request", SimpleNamespace(headers=bearer("read"), ctx=SimpleNamespace()))
    request.headers["authorization"] = request.headers.pop("Authorization")
    guard.admit(request, "read")
    tokens = (each for each in gc.get_objects() if type(each) is Tokens)
    old = [weakref.ref(each) for each in tokens if each not in others]
    assert request.ctx.readmit()
    guard.load_tokens()
    gc.collect()
    assert old
    assert not [each for each in old if each() is not None]
    assert not request.ctx.readmit()

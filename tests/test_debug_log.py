"""The log at the level `debug` has each decision about a request; at other levels, it has none."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from harmonia.config.tokens import new
from harmonia.tools.store_builder import StoreBuilder
from support.running import Server, Session, file_url, nar_url, wait_until
from support.upstream_paths import KEY, entry, make_path, narinfo_path
from support.upstream_server import UpstreamServer

Start = Callable[..., Server]

DEBUG = "log_level = 'debug'"


@pytest.fixture
def store(tmp_path: Path) -> StoreBuilder:
    return StoreBuilder(tmp_path / "store")


def decisions(server: Server, request: str) -> list[str]:
    """Return the decisions about a request, without its client, when it is finished."""
    pattern = re.compile(rf"\S+ DEBUG {re.escape(request)}: (.*)\n")

    def found() -> list[str]:
        return [match[1] for line in list(server.log) if (match := pattern.fullmatch(line))]

    wait_until(lambda: any(line.startswith("status ") for line in found()))
    return [line.partition(", client ")[0] for line in found()]


def test_each_step_of_a_narinfo_is_logged(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    info = store.add_text("text", b"")
    server = start(store=tmp_path / "store", settings=DEBUG)
    url = f"/{info.path.hash_part}.narinfo"
    size = len(server.get(url).body)
    assert decisions(server, f"GET {url}") == [
        "route narinfo",
        f"{info.path} is valid, and may be served",
        "from store: its row in the database was read",
        "FileHash and FileSize unknown: never compressed here",
        f"status 200, {size} bytes sent, outcome store",
    ]


def test_each_step_of_a_compressed_nar_is_logged(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    info = store.add(store.output_path("big"), os.urandom(2 << 20))
    server = start(store=tmp_path / "store", settings=DEBUG)
    size = len(server.get(nar_url(info), {"Accept-Encoding": "zstd"}).body)
    assert decisions(server, f"GET {nar_url(info)}") == [
        "route nar",
        f"{info.path} is valid, and may be served",
        "content coding zstd, for Accept-Encoding",
        "from compressed: the file in the cache grows while it is sent",
        f"status 200, {size} bytes sent, outcome compressed",
    ]


def test_rule_that_forbids_a_path_is_logged(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    info = store.add_text("secret", b"")
    server = start(store=tmp_path / "store", settings=f"{DEBUG}\n[publish]\ndeny = ['secret*']")
    assert server.get(f"/{info.path.hash_part}.narinfo").status == 404
    assert decisions(server, f"GET /{info.path.hash_part}.narinfo")[1:-1] == [
        f'{info.path} may not be served: "secret*" of publish.deny matches its name'
    ]
    absent = "0" * 32
    assert server.get(f"/{absent}.narinfo").status == 404
    assert decisions(server, f"GET /{absent}.narinfo")[1:-1] == [f"no valid path has the hash {absent}"]


def test_what_upstreams_answer_is_logged(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    store.add_text("here", b"")
    remote = make_path(tmp_path / "remote")
    with UpstreamServer() as upstream:
        upstream.add(remote.info, remote.file, remote.nar, (KEY,))
        server = start(store=tmp_path / "store", settings=f"{DEBUG}\nupstream_timeout = 20.0\n{entry(upstream)}")
        server.get(narinfo_path(remote))
        absent = f"/{'0' * 32}.narinfo"
        server.get(absent)
        assert decisions(server, f"GET {narinfo_path(remote)}")[1:-1] == [
            f"no valid path has the hash {remote.info.path.hash_part}",
            "the local store does not have it: asking upstreams",
            f"{upstream.url} has it",
            f"from upstream: the narinfo of {upstream.url}",
        ]
        assert decisions(server, f"GET {absent}")[3:-1] == [f"{upstream.url} does not have it, or it was refused"]
        server.get(f"{absent}?again")
        assert decisions(server, f"GET {absent}?again")[3:-1] == ["upstreams: remembered that none has it"]


def test_token_and_its_lack_are_logged(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    store.add_text("here", b"")
    secret, token = new("ci", ("read",))
    (tmp_path / "tokens").write_text(f"{token}\n")
    server = start(store=tmp_path / "store", settings=f"{DEBUG}\ntokens_path = '{tmp_path}/tokens'")
    cases = {
        "good": (secret, "the token ci has the scope read"),
        "none": ("", "no token, but the scope read needs one"),
        "bad": ("guessed", "invalid token, but the scope read needs one"),
    }
    for name, (presented, line) in cases.items():
        server.get(f"/nix-cache-info?{name}", {"Authorization": f"Bearer {presented}"} if presented else {})
        assert decisions(server, f"GET /nix-cache-info?{name}")[1] == line
    assert not [line for line in server.log if secret in line or "guessed" in line]


@pytest.mark.parametrize("sent", ["7f3a", "a.b:c@d/e+f=g_h-i"])
def test_id_of_a_request_is_in_each_line(start: Start, store: StoreBuilder, tmp_path: Path, sent: str) -> None:
    store.add_text("here", b"")
    server = start(store=tmp_path / "store", settings=f"{DEBUG}\naccess_log = true")
    server.get("/nix-cache-info", {"X-Request-ID": sent})
    assert len(decisions(server, f"[{sent}] GET /nix-cache-info")) > 1
    server.wait_for_log(rf"'GET /nix-cache-info' 200 .* request_id={re.escape(sent)}$")


@pytest.mark.parametrize("sent", ["", "a b", "x] GET /forged: y", "é", "a" * 129])
def test_malformed_id_of_a_request_is_ignored(start: Start, store: StoreBuilder, tmp_path: Path, sent: str) -> None:
    store.add_text("here", b"")
    server = start(store=tmp_path / "store", settings=f"{DEBUG}\naccess_log = true")
    server.get("/nix-cache-info", {"X-Request-ID": sent})
    assert len(decisions(server, "GET /nix-cache-info")) > 1
    assert not [line for line in server.log if "request_id" in line or "forged" in line]


def test_json_has_the_id_of_a_request_as_a_field(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    store.add_text("here", b"")
    server = start(store=tmp_path / "store", settings=f"{DEBUG}\naccess_log = true\nlog_format = 'json'")
    server.get("/nix-cache-info", {"X-Request-ID": "7f3a"})
    server.wait_for_log('"url": "/nix-cache-info"')
    events = [json.loads(line) for line in list(server.log)]
    ours = [event for event in events if event.get("request_id") == "7f3a"]
    assert {event["logger"] for event in ours} == {"harmonia.request", "harmonia.access"}
    assert ours[0]["message"].startswith("[7f3a] GET /nix-cache-info: route cache_info")


def test_decisions_about_one_request_are_not_logged_for_another(
    start: Start, store: StoreBuilder, tmp_path: Path
) -> None:
    info = store.add_text("text", b"")
    server = start(store=tmp_path / "store", settings=DEBUG)
    with Session(server) as session:
        for path in (f"/{info.path.hash_part}.narinfo", "/unknown", file_url(info), "/unknown?again"):
            session.get(path)
    for path in ("/unknown", "/unknown?again"):
        assert decisions(server, f"GET {path}") == ["status 404, 10 bytes sent, outcome none"]
    assert decisions(server, f"GET {file_url(info)}")[0] == "route nar"


def test_repeated_requests_are_logged_each_time(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    info = store.add_text("text", b"")
    server = start(store=tmp_path / "store", settings=DEBUG)
    url = f"/{info.path.hash_part}.narinfo"
    with Session(server) as session:
        for _ in range(3):
            session.get(url)
    wait_until(lambda: len(decisions(server, f"GET {url}")) >= 15)
    assert decisions(server, f"GET {url}").count("route narinfo") == 3


def test_other_levels_log_no_decision(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    info = store.add_text("text", b"")
    server = start(store=tmp_path / "store", settings="log_level = 'info'")
    server.get(f"/{info.path.hash_part}.narinfo", {"X-Request-ID": "7f3a"})
    assert server.stop() == 0
    assert len(server.log) == 3, server.log  # overview, start and stop

"""`/get-narinfos-v1`: one request gets the narinfos of many paths, exactly as one request for each would."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmonia.config.tokens import new
from harmonia.tools.store_builder import StoreBuilder
from support.raw_http import exchange
from support.running import FROZEN_RATES, Answer, Server, patched, unpacked, wait_until
from support.upstream_paths import KEY, entry, make_path
from support.upstream_server import UpstreamServer

Start = Callable[..., Server]

URL = "/get-narinfos-v1"
ABSENT = ["0" * 32, "1" * 32]
MANY = 100  # more than one chunk


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Build a store, and return its root and hash parts."""
    root = tmp_path_factory.mktemp("many") / "store"
    store = StoreBuilder(root)
    return root, [store.add_text(f"path-{number}", b"text\n").path.hash_part for number in range(MANY)]


@pytest.fixture(scope="module")
def many(paths: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, list[str]]]:
    root, hash_parts = paths
    server = Server(tmp_path_factory.mktemp("server") / "server", root)
    server.start()
    yield server, hash_parts
    assert server.stop() == 0
    assert not [line for line in server.log if "Traceback" in line]


def ask(server: Server, *lines: str, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return server.post(URL, "".join(f"{line}\n" for line in lines).encode(), named)


def narinfos(server: Server, *hash_parts: str) -> str:
    """Return the narinfos from a request for each, separated by empty lines."""
    answers = [server.get(f"/{hash_part}.narinfo") for hash_part in hash_parts]
    return "\n".join(answer.text for answer in answers if answer.status == 200)


def test_narinfos_are_those_of_single_requests(many: tuple[Server, list[str]]) -> None:
    server, hash_parts = many
    answer = ask(server, *hash_parts)
    assert (answer.status, answer.headers["content-type"]) == (200, "text/x-nix-narinfo")
    assert (answer.headers["cache-control"], answer.headers["vary"]) == ("no-store", "Accept-Encoding")
    assert "etag" not in answer.headers
    assert answer.text == narinfos(server, *hash_parts)
    assert answer.text.count("\n\n") == MANY - 1


@given(st.data())
def test_any_lines_get_the_narinfos_of_valid_paths_in_their_order(
    many: tuple[Server, list[str]], data: st.DataObject
) -> None:
    server, hash_parts = many
    lines = data.draw(st.lists(st.sampled_from([*hash_parts[:3], *hash_parts[-40:], *ABSENT])))
    assert ask(server, *lines).text == narinfos(server, *dict.fromkeys(lines))


@pytest.mark.parametrize("body", ["{0}\r\n{1}\r\n", "{0}\n{1}", "\n\n{0}\n\n{1}\n\n"])
def test_other_line_ends_and_empty_lines_are_accepted(many: tuple[Server, list[str]], body: str) -> None:
    server, hash_parts = many
    assert server.post(URL, body.format(*hash_parts).encode()).text == narinfos(server, *hash_parts[:2])


@pytest.mark.parametrize("lines", [[], ABSENT])
def test_nothing_found_is_an_empty_response(many: tuple[Server, list[str]], lines: list[str]) -> None:
    for headers in ({}, {"Accept_Encoding": "zstd"}):
        answer = ask(many[0], *lines, **headers)
        assert answer.status == 200
        assert (unpacked(answer.body) if headers else answer.body) == b""


def test_response_is_sent_in_zstd_if_accepted(many: tuple[Server, list[str]]) -> None:
    server, hash_parts = many
    answer = ask(server, *hash_parts, Accept_Encoding="zstd, br")
    assert answer.headers["content-encoding"] == "zstd"
    assert unpacked(answer.body).decode() == ask(server, *hash_parts).text


def test_http_1_0_gets_a_length(many: tuple[Server, list[str]]) -> None:
    server, hash_parts = many
    answer = server.post(URL, "\n".join(hash_parts).encode(), {"Accept-Encoding": "zstd"}, version="1.0")
    assert answer.headers["content-length"] == str(len(answer.body))
    assert answer.text == ask(server, *hash_parts).text


def test_connection_is_kept(many: tuple[Server, list[str]]) -> None:
    server, hash_parts = many
    one = f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Length: 32\r\n\r\n{hash_parts[0]}"
    last = "GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    seen = exchange(server.url, (one + one + last).encode())
    assert [answer.status for answer in seen] == [200, 200, 200]
    assert seen[0].body == seen[1].body == narinfos(server, hash_parts[0])


@pytest.mark.parametrize("line", ["e" * 32, "0" * 31, "0" * 33, "0" * 32 + "-name", "0" * 32 + ".narinfo", "é" * 32])
def test_malformed_line_gets_400_with_the_reason(many: tuple[Server, list[str]], line: str) -> None:
    answer = ask(many[0], many[1][0], line)
    assert answer.status == 400
    assert "is not the hash part of a store path" in answer.text


def test_too_many_lines_or_bytes_get_413(many: tuple[Server, list[str]]) -> None:
    server = many[0]
    assert ask(server, *["0" * 32] * 10_000).status == 200
    answer = ask(server, *["0" * 32] * 10_001)
    assert (answer.status, "at most 10000 hash parts" in answer.text) == (413, True)
    assert server.post(URL, b"\n" * 340_001).status == 413
    assert server.post(URL, b"", {"Content-Length": "9" * 18}).status == 413
    assert server.get("/version").status == 200


def test_body_without_length_gets_411(many: tuple[Server, list[str]]) -> None:
    assert many[0].request("POST", URL).status == 411
    assert many[0].request("POST", URL, {"Transfer-Encoding": "chunked"}).status == 411


def test_each_path_counts_for_max_bulk_rate(start: Start, paths: tuple[Path, list[str]]) -> None:
    settings = "max_bulk_rate = 10000\ntrusted_proxies = ['127.0.0.1']"
    server = start(store=paths[0], settings=settings, program=patched(FROZEN_RATES))
    client = {"X_Forwarded_For": "10.0.0.1"}
    lines = [f"{number:032}" for number in range(10_000)]
    assert ask(server, *lines[:5000], **client).status == 200
    refused = ask(server, *lines, **client)  # would be permitted 30 s later
    assert refused.status == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert ask(server, *lines[:5000], **client).status == 200
    assert ask(server, *lines, X_Forwarded_For="10.0.0.2").status == 200


def test_unpublished_paths_are_left_out(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    shown, hidden = (store.add_text(name, b"text\n").path.hash_part for name in ("shown", "hidden"))
    server = start(store=tmp_path / "store", settings="[publish]\nallow = ['shown']")
    assert ask(server, hidden, shown).text == narinfos(server, shown)


def test_malformed_row_is_left_out(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    good, bad = (store.add_text(name, b"text\n").path for name in ("good", "bad"))
    with store.connect() as connection:
        connection.execute("update ValidPaths set narSize = null where path = ?", [f"/nix/store/{bad}"])
    server = start(store=tmp_path / "store")
    assert ask(server, bad.hash_part, good.hash_part).text == narinfos(server, good.hash_part)


def test_new_and_deleted_paths_are_visible_at_once(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    old = store.add_text("old", b"text\n").path
    server = start(store=tmp_path / "store")
    assert ask(server, old.hash_part).text.startswith(f"StorePath: /nix/store/{old}\n")
    new_path = store.add_text("new", b"text\n").path
    with store.connect() as connection:
        connection.execute("delete from ValidPaths where path = ?", [f"/nix/store/{old}"])
    assert ask(server, old.hash_part, new_path.hash_part).text.startswith(f"StorePath: /nix/store/{new_path}\n")


def test_token_is_checked_before_the_body(start: Start, paths: tuple[Path, list[str]], tmp_path: Path) -> None:
    secret, token = new("reader", ["read"])
    (tmp_path / "tokens").write_text(str(token))
    server = start(store=paths[0], settings=f"tokens_path = '{tmp_path}/tokens'")
    assert ask(server, "malformed").status == 401
    assert ask(server, paths[1][0], Authorization=f"Bearer {secret}").status == 200


def test_database_that_fails_meanwhile_breaks_the_response_off(start: Start, paths: tuple[Path, list[str]]) -> None:
    failing = patched(
        "from harmonia.errors import StoreUnavailableError\nfrom harmonia.server.path_lookup import Paths\n"
        "look_up, asked = Paths.lookup_path, []\n"
        "async def fail(self, hash_part):\n"
        "    asked.append(hash_part)\n"
        "    if len(asked) > 50: raise StoreUnavailableError('gone')\n"
        "    return await look_up(self, hash_part)\n"
        "Paths.lookup_path = fail"
    )
    server = start(store=paths[0], program=failing)
    with pytest.raises(Exception, match=r"IncompleteRead|reset"):
        ask(server, *paths[1])
    wait_until(lambda: any("breaks off" in line for line in server.log))


def test_paths_of_upstreams_are_included(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    here = store.add_text("here", b"text\n").path.hash_part
    there = make_path(tmp_path / "elsewhere")
    with UpstreamServer() as upstream:
        upstream.add(there.info, there.file, there.nar, (KEY,))
        server = start(store=tmp_path / "store", settings=f"upstream_timeout = 20.0\n{entry(upstream)}")
        hash_part = there.info.path.hash_part
        assert ask(server, hash_part, ABSENT[0], here).text == narinfos(server, hash_part, here)
        assert upstream.asked[f"GET /{ABSENT[0]}.narinfo"] == 1


def test_slow_request_for_many_paths_delays_no_other(many: tuple[Server, list[str]]) -> None:
    """The response waits for a client that does not read, and other clients are served meanwhile."""
    server, hash_parts = many
    body = "\n".join(hash_parts * (10_000 // MANY)).encode()
    head = f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with server.connect() as slow:
        slow.sendall(head + body)
        assert server.get(f"/{hash_parts[0]}.narinfo").status == 200
        assert slow.recv(12) == b"HTTP/1.1 200"


def test_push_url_has_all_valid_paths_for_pushers(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    hidden = store.add_text("hidden", b"text\n").path.hash_part
    secret, token = new("ci", ["push"])
    (tmp_path / "tokens").write_text(str(token))
    server = start(
        store=tmp_path / "store",
        settings=f"tokens_path = '{tmp_path}/tokens'\ndaemon_socket = '{tmp_path}/socket'\n"
        f"[publish]\nallow = ['none']\n[push]\nenable = true\nallow_without_tls = true\nstate_dir = '{tmp_path}/state'",
    )
    headers = {"Authorization": f"Bearer {secret}"}
    body = f"{ABSENT[0]}\n{hidden}\n".encode()
    answer = server.post(f"/push{URL}", body, headers)
    assert answer.text == server.get(f"/push/{hidden}.narinfo", headers).text
    assert server.post(f"/push{URL}", body).status == 401
    assert server.post(URL, body, headers).status == 403
    assert "GetNarInfosV1: get-narinfos-v1\n" in server.get("/push/nix-cache-info", headers).text

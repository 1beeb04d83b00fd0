"""`/events` reports what happens in the store and in all workers, and nothing of paths that are not served."""

import http.client
import os
import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey
from harmonia.process.event_log import EventLog
from harmonia.tools.fixture_tree import Sparse
from harmonia.tools.store_builder import StoreBuilder
from support.event_client import EventClient, follow
from support.running import LONG_GRACE, Server, file_url, lock_holders, nar_url, patched, wait_until

Start = Callable[..., Server]

EVENTS = "from harmonia.server import events; events."


def name(info: PathInfo) -> str:
    return f"/nix/store/{info.path}"


def remove(store: StoreBuilder, *infos: PathInfo) -> None:
    with store.connect() as connection:
        for info in infos:
            connection.execute("delete from ValidPaths where path = ?", (name(info),))


@pytest.fixture
def store(tmp_path: Path) -> StoreBuilder:
    store = StoreBuilder(tmp_path / "store")
    store.add_text("old", b"old")
    return store


@pytest.fixture
def serve(store: StoreBuilder, start: Start) -> Start:
    """Return a function that starts a server of the store with `browse`."""
    root = Path(store.real_dir).parents[1]
    return lambda settings="", **options: start(store=root, settings=f"browse = true\n{settings}", **options)


def test_new_collected_and_served_paths_are_reported(store: StoreBuilder, serve: Start) -> None:
    first = store.add_text("first", b"first")
    server = serve()
    with follow(server) as client:
        new = store.add_text("new", b"new")
        event = client.until("valid")
        assert event.data == {"path": name(new), "narSize": new.nar_size}
        remove(store, first)
        assert client.until("collected").data == {"path": name(first)}
        body = server.get(nar_url(new)).body
        served = {"path": name(new), "bytes": len(body), "complete": True}
        assert client.until("served").data == served
        compressed = server.get(file_url(new)).body
        sizes = {"narSize": new.nar_size, "downloadSize": len(compressed)}
        assert client.until("compressed").data == {"path": name(new), **sizes}
        assert client.until("served").data["bytes"] == len(compressed)
        with server.connect() as connection:  # a response that the protocol replays
            for _ in range(3):
                connection.sendall(f"GET {nar_url(new)} HTTP/1.1\r\nHost: cache\r\n\r\n".encode())
                assert connection.recv(65536)
                assert client.until("served").data == served


def test_large_compressed_nar_is_reported_once(store: StoreBuilder, serve: Start) -> None:
    info = store.add(store.output_path("large"), Sparse(9 << 20))
    server = serve()
    with follow(server, "?event=compressed") as client:
        sent = len(server.get(file_url(info)).body)
        sizes = {"narSize": info.nar_size, "downloadSize": sent}
        assert client.until("compressed").data == {"path": name(info), **sizes}


def test_download_that_ends_early_is_reported_as_incomplete(store: StoreBuilder, serve: Start) -> None:
    info = store.add(store.output_path("large"), Sparse(64 << 20))
    server = serve()
    with follow(server, "?event=served") as client:
        with server.connect(receive_buffer=8192) as connection:
            connection.sendall(f"GET {nar_url(info)} HTTP/1.1\r\nHost: cache\r\n\r\n".encode())
            connection.recv(4096)
        event = client.until("served")
        assert not event.data["complete"]
        assert 0 < event.data["bytes"] < info.nar_size


def test_responses_without_nar_are_not_reported(store: StoreBuilder, serve: Start) -> None:
    info = store.add_text("text", b"text")
    server = serve()
    with follow(server) as client:
        server.head(nar_url(info))
        server.get(nar_url(info), {"If-None-Match": "*"})
        server.get(f"/nar/{info.path.hash_part}-{'0' * 52}.nar")
        server.get(f"/{info.path.hash_part}.narinfo")
        end = store.add_text("end", b"")
        event = client.next()
        assert event is not None
        assert (event.name, event.data["path"]) == ("valid", name(end))


def test_client_sees_what_another_worker_serves(store: StoreBuilder, serve: Start) -> None:
    info = store.add_text("text", b"text")
    server = serve(workers=3)
    with follow(server, "?event=served") as client:
        for _ in range(20):  # the kernel distributes connections over the workers
            server.get(nar_url(info))
        for _ in range(20):
            client.until("served")


def test_stream_continues_after_the_last_event_id(store: StoreBuilder, serve: Start) -> None:
    server = serve(workers=2)
    with follow(server) as client:
        store.add_text("one", b"")
        seen = client.until("valid")
    missed = [store.add_text(f"missed-{number}", b"") for number in range(3)]
    wait_until(lambda: logged(server, "valid") == 4)
    with follow(server, headers={"Last-Event-ID": str(seen.number)}) as client:
        events = [client.next() for _ in missed]
        assert [event and event.data["path"] for event in events] == [name(info) for info in missed]
        assert client.last == seen.number + 3


def logged(server: Server, event: str) -> int:
    """Return the number of events in the log."""
    with sqlite3.connect(f"file:{server.cache_dir}/events/log.sqlite?mode=ro", uri=True) as connection:
        [(count,)] = connection.execute("select count(*) from events where name = ?", (event,))
    return int(count)


def test_without_an_id_only_new_events_are_sent(store: StoreBuilder, serve: Start) -> None:
    server = serve()
    with follow(server) as client:
        store.add_text("one", b"")
        client.until("valid")
        with follow(server) as other:
            new = store.add_text("two", b"")
            event = other.next()
            assert event is not None
            assert event.data["path"] == name(new)


@pytest.mark.parametrize("last", ["0", "12", str(2**53)])
def test_gap_is_reported_if_events_are_missing(serve: Start, last: str) -> None:
    server = serve()
    with follow(server, headers={"Last-Event-ID": last}) as client:
        event = client.next()
        assert event is not None
        assert event.name == "gap"


def test_restart_is_a_gap_for_a_client_that_continues(store: StoreBuilder, serve: Start) -> None:
    server = serve()
    with follow(server) as client:
        store.add_text("one", b"")
        last = client.until("valid").number
    server.stop()
    server.log.clear()
    store.add_text("unseen", b"")
    server.start()
    with follow(server, headers={"Last-Event-ID": str(last)}) as client:
        event = client.next()
        assert event is not None
        assert (event.number, event.name) == (last + 1, "gap")
        new = store.add_text("new", b"")
        assert client.until("valid").data["path"] == name(new)


def test_malformed_last_event_id_is_ignored(store: StoreBuilder, serve: Start) -> None:
    server = serve()
    with follow(server, headers={"Last-Event-ID": "-1; x"}) as client:
        new = store.add_text("new", b"")
        event = client.next()
        assert event is not None
        assert event.data["path"] == name(new)


def test_only_selected_events_are_sent(store: StoreBuilder, serve: Start) -> None:
    info = store.add_text("text", b"text")
    server = serve()
    with follow(server, "?event=collected&event=valid") as client:
        server.get(nar_url(info))
        wait_until(lambda: logged(server, "served") == 1)
        remove(store, info)
        event = client.next()
        assert event is not None
        assert event.name == "collected"
    assert server.get("/events?event=other").status == 400


def test_path_that_is_collected_and_made_again_is_reported_twice(store: StoreBuilder, serve: Start) -> None:
    info = store.add_text("text", b"text")
    server = serve()
    with follow(server) as client, store.connect() as connection:
        row = connection.execute("select * from ValidPaths where path = ?", (name(info),)).fetchone()
        connection.execute("delete from ValidPaths where path = ?", (name(info),))
        connection.execute(f"insert into ValidPaths values (null{', ?' * (len(row) - 1)})", row[1:])
        connection.commit()
        events = [client.next(), client.next()]
        assert [(event.name, event.data["path"]) for event in events if event] == [
            ("collected", name(info)),
            ("valid", name(info)),
        ]


def test_many_new_and_collected_paths_are_all_reported(store: StoreBuilder, serve: Start) -> None:
    server = serve()
    count = 3000
    with follow(server) as client:
        with store.connect() as connection:
            rows = [(f"/nix/store/{number:032d}-many", "sha256:" + "0" * 64) for number in range(count)]
            insert = "insert into ValidPaths (path, hash, registrationTime, narSize) values (?, ?, 0, 1)"
            connection.executemany(insert, rows)
        assert [client.until("valid").data["path"] for _ in range(count)] == [row[0] for row in rows]
        with store.connect() as connection:
            connection.execute("delete from ValidPaths where path like '%-many'")
        assert {client.until("collected").data["path"] for _ in range(count)} == {row[0] for row in rows}


def test_private_paths_are_never_reported(store: StoreBuilder, serve: Start) -> None:
    old = store.add_text("secret-old", b"")
    settings = "publish.deny = ['secret-*']"
    server = serve(settings)
    with follow(server) as client:
        secret = store.add_text("secret-new", b"")
        server.get(nar_url(secret))
        remove(store, old, secret)
        new = store.add_text("new", b"")
        event = client.next()
        assert event is not None
        assert event.data["path"] == name(new)


def test_path_is_reported_when_it_is_published_and_then_collected(store: StoreBuilder, serve: Start) -> None:
    key = SecretKey.generate("key-1")
    old = store.add_text("old-unsigned", b"")
    settings = f"publish.signed_by = ['{key.public_key}']"
    server = serve(settings)
    with follow(server) as client:
        info = store.add_text("late", b"")
        other = store.add_text("unsigned", b"")
        signature = key.sign(info.fingerprint("/nix/store"))
        with store.connect() as connection:
            connection.execute("update ValidPaths set sigs = ? where path = ?", (signature, name(info)))
        event = client.next()
        assert event is not None
        assert (event.name, event.data["path"]) == ("valid", name(info))
        remove(store, old, other, info)
        event = client.next()
        assert event is not None
        assert (event.name, event.data["path"]) == ("collected", name(info))


def test_path_of_a_gc_root_is_reported_after_the_root_exists(store: StoreBuilder, serve: Start) -> None:
    roots = Path(store.real_dir).parents[1] / "roots"
    roots.mkdir()
    server = serve(f"publish.gc_roots = ['{roots}']")
    with follow(server) as client:
        store.add_text("private", b"")
        info = store.add_text("system", b"")
        (roots / "system").symlink_to(name(info))
        event = client.next()
        assert event is not None
        assert (event.name, event.data["path"]) == ("valid", name(info))


def test_another_worker_takes_over_if_the_leader_is_killed(store: StoreBuilder, serve: Start) -> None:
    server = serve(workers=2)
    with ExitStack() as stack:
        clients = [stack.enter_context(follow(server)) for _ in range(6)]
        [leader] = lock_holders(server.cache_dir / "events/leader")
        store.add_text("one", b"")
        for client in clients:
            client.until("valid")
        os.kill(leader, signal.SIGKILL)
        two = store.add_text("two", b"")
        survivors = 0
        for client in clients:
            try:
                assert client.until("valid").data["path"] == name(two)
                survivors += 1
            except (OSError, AssertionError, EOFError):
                assert client.response.isclosed() or client.next() is None
        if not survivors:  # the kernel gave all connections to one worker
            with follow(server, headers={"Last-Event-ID": str(clients[0].last)}) as client:
                client.until("gap")


def test_heartbeat_keeps_the_connection_in_use(serve: Start) -> None:
    server = serve(program=patched(f"{EVENTS}_HEARTBEAT_S = 0.05"))
    with follow(server) as client:
        assert [client.block() for _ in range(3)] == [[":", f"id: {client.last}"]] * 3


def test_client_that_does_not_read_is_disconnected(store: StoreBuilder, serve: Start) -> None:
    program = patched(f"""
{EVENTS}_SLOW_S = 0.5
import socket
listen = socket.socket.listen
def little_buffered(self, *arguments):
    self.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    listen(self, *arguments)
socket.socket.listen = little_buffered
""")
    server = serve(program=program)
    with follow(server, receive_buffer=4096) as client:
        with store.connect() as connection:
            rows = [(f"/nix/store/{number:032d}-{'x' * 200}",) for number in range(2000)]
            insert = "insert into ValidPaths (path, hash, registrationTime) values (?, '', 0)"
            connection.executemany(insert, rows)
        wait_until(lambda: "harmonia_events_disconnected_total 1.0" in server.get("/metrics").text)
        # The last byte may be that of a whole event.
        broken = (ConnectionError, http.client.IncompleteRead, AssertionError)
        with pytest.raises(broken, match=r"reset|IncompleteRead|the stream ended"):
            client.until("gap")


def test_clients_are_limited(serve: Start) -> None:
    program = patched(f"{EVENTS}_MAX_LISTENERS = 3; {EVENTS.split('; ')[1]}_MAX_LISTENERS_PER_CLIENT = 2")
    settings = "trusted_proxies = ['127.0.0.1']"
    server = serve(settings, program=program)

    def open_as(stack: ExitStack, client: str) -> EventClient:
        return stack.enter_context(follow(server, headers={"X-Forwarded-For": client}))

    with ExitStack() as stack:
        assert [open_as(stack, "192.0.2.1").response.status for _ in range(3)] == [200, 200, 429]
        refused = open_as(stack, "192.0.2.1").response
        assert (refused.status, refused.headers["retry-after"]) == (429, "60")
        assert [open_as(stack, f"192.0.2.{number}").response.status for number in (2, 3)] == [200, 503]

    def is_admitted() -> bool:
        with ExitStack() as stack:
            return open_as(stack, "192.0.2.1").response.status == 200

    wait_until(is_admitted)


def test_stream_ends_at_a_graceful_shutdown(serve: Start) -> None:
    server = serve(f"{LONG_GRACE}")
    with follow(server) as client:
        server.process.send_signal(signal.SIGTERM)
        assert client.next() is None
    assert server.wait() == 0
    assert not [line for line in server.log if "Traceback" in line or "breaks off" in line]


def test_stream_ends_at_a_reload(serve: Start) -> None:
    server = serve()
    with follow(server) as client:
        server.process.send_signal(signal.SIGHUP)
        assert client.next() is None


def test_stream_has_the_headers_that_proxies_need(serve: Start) -> None:
    server = serve()
    with follow(server) as client:
        headers = client.response.headers
        assert headers["content-type"] == "text/event-stream"
        assert headers["cache-control"] == "no-store"
        assert headers["x-accel-buffering"] == "no"
        assert headers["transfer-encoding"] == "chunked"
        assert "etag" not in headers
    head = server.head("/events")
    assert (head.status, head.headers["content-type"]) == (200, "text/event-stream")


@pytest.mark.parametrize(
    ("accept", "status"),
    [("text/event-stream", 200), ("text/*", 200), ("text/html, */*;q=0.1", 200), ("text/html", 406)],
)
def test_accept_is_negotiated(
    serve: Start,
    accept: str,
    status: int,
) -> None:
    server = serve()
    with follow(server, headers={"Accept": accept}) as client:
        assert client.response.status == status


def test_http_1_0_gets_406(serve: Start) -> None:
    server = serve()
    assert server.request("GET", "/events", version="1.0").status == 406


def test_without_browse_there_are_no_events(store: StoreBuilder, start: Start, tmp_path: Path) -> None:
    info = store.add_text("text", b"text")
    server = start(store=tmp_path / "store")
    assert server.get("/events").status == 404
    server.get(nar_url(info))
    assert not (server.cache_dir / "events").exists()


def test_nothing_is_recorded_while_nobody_listens(store: StoreBuilder, serve: Start, tmp_path: Path) -> None:
    info = store.add_text("text", b"text")
    expired = tmp_path / "expired"
    program = patched(
        "import os, sys\nfrom harmonia.process.event_log import Recorder\n"
        "wanted = Recorder.is_recording.fget\n"
        "def is_recording(self):\n"
        f"  if os.path.exists({str(expired)!r}):\n"
        "    self._shared[0] = 0.0\n"
        "    print('not recording', file=sys.stderr, flush=True)\n"
        "  return wanted(self)\n"
        "Recorder.is_recording = property(is_recording)"
    )
    server = serve(program=program)
    with follow(server) as client:
        server.get(nar_url(info))
        client.until("served")
    server.settle()
    expired.touch()
    server.wait_for_log("not recording")
    expired.unlink()
    server.get(nar_url(info))
    with follow(server, headers={"Last-Event-ID": str(client.last)}) as client:
        event = client.next()
        assert event is not None
        assert event.name == "gap"
        assert logged(server, "served") == 1


def test_damaged_log_is_replaced(store: StoreBuilder, serve: Start) -> None:
    server = serve()
    (server.cache_dir / "events").mkdir(parents=True)
    (server.cache_dir / "events/log.sqlite").write_bytes(b"no database" * 1000)
    statuses: list[int] = []
    while 200 not in statuses and len(statuses) < 10:
        with follow(server) as client:
            statuses.append(client.response.status)
            if statuses[-1] == 200:
                new = store.add_text("new", b"")
                assert client.until("valid").data["path"] == name(new)
    assert set(statuses) == {503, 200}


def test_unexpected_error_is_logged_and_events_continue(store: StoreBuilder, serve: Start) -> None:
    program = patched("""
import os
import sys
from harmonia.store.path_changes import PathChanges
poll = PathChanges.poll
def broken(self):
    if os.path.exists(os.path.join(os.path.dirname(sys.argv[-1]), "broken")):
        raise ZeroDivisionError("a bug")
    return poll(self)
PathChanges.poll = broken
""")
    server = serve(program=program)
    with follow(server) as client:
        (server.directory / "broken").touch()
        server.wait_for_log("ERROR cannot follow events for /events: a bug; trying again .*Traceback")
        (server.directory / "broken").unlink()
        new = store.add_text("new", b"")
        assert client.until("valid").data["path"] == name(new)


def test_log_that_another_process_creates_at_the_same_time_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(sqlite3.connect(tmp_path / "log.sqlite", isolation_level=None)) as other:
        other.execute("begin immediate")
        monkeypatch.setattr(time, "sleep", lambda _: other.execute("rollback"))
        with closing(EventLog(str(tmp_path))) as log:
            assert [event.name for event in log.events(0)] == ["gap"]


def test_event_data_is_one_line_of_json(store: StoreBuilder, serve: Start) -> None:
    server = serve()
    with follow(server) as client:
        info = store.add_text("new", b"")
        lines = client.block()
        data = f'{{"path":"{name(info)}","narSize":{info.nar_size}}}'
        assert lines[1:] == ["event: valid", f"data: {data}"]

"""`harmonia top` shows the activity of a running server, from its metrics alone."""

import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from harmonia.tools.store_builder import StoreBuilder
from harmonia.tools.top import Snapshot, hit_ratio, route_activities
from support.preloaded import popen
from support.running import HARMONIA, NO_SMALL_NARS, PATIENCE_S, Sample, Server, download, nar_url, run, wait_until

Start = Callable[..., Server]
Samples = dict[str, dict[tuple[tuple[str, str], ...], float]]


def snapshot(at: float, **samples: float) -> Snapshot:
    """Return a snapshot: `nar_200` counts requests, `nar_sent` bytes, `nar` requests in flight."""
    found: Samples = {}
    for name, value in samples.items():
        route, _, field = name.partition("_")
        label = ("route", route)
        if field.isdigit():
            found.setdefault("harmonia_requests_total", {})[label, ("status", field)] = value
        else:
            metric = "harmonia_sent_bytes_total" if field else "harmonia_requests_in_flight"
            found.setdefault(metric, {})[(label,)] = value
    return Snapshot(at, found)


def test_rates_are_computed_from_two_snapshots() -> None:
    before = snapshot(10, nar=0, log=0, nar_200=5, nar_sent=1000)
    now = snapshot(12, nar=3, log=0, nar_200=9, nar_500=2, nar_sent=5000, log_404=1, log_sent=0)
    nar, log = route_activities(before, now)
    assert (nar.route, nar.requests, nar.request_rate, nar.failed, nar.in_flight) == ("nar", 11, 3, 2, 3)
    assert (nar.sent, nar.sent_rate) == (5000, 2000)
    assert (log.route, log.requests, log.request_rate, log.failed) == ("log", 1, 0.5, 0)


def test_restarted_server_has_no_negative_rates() -> None:
    [row] = route_activities(snapshot(10, nar=0, nar_200=50, nar_sent=9), snapshot(12, nar=0, nar_200=1, nar_sent=1))
    assert (row.request_rate, row.sent_rate) == (0, 0)


def test_hit_ratio_is_hits_per_lookup() -> None:
    assert hit_ratio(Snapshot(0)) is None
    samples: Samples = {"harmonia_cache_hits_total": {(): 3.0}, "harmonia_cache_misses_total": {(): 1.0}}
    assert hit_ratio(Snapshot(0, samples)) == 0.75


def test_once_prints_one_view(tmp_path: Path, start: Start) -> None:
    sample = Sample.make(tmp_path / "store")
    server = start(store=sample.root, program=NO_SMALL_NARS)
    for _ in range(2):  # a small NAR is cached when it is compressed the second time
        server.get(nar_url(sample.small) + ".zst")
    wait_until(lambda: "harmonia_cache_fills_total 1.0" in server.get("/metrics").text)
    for _ in range(2):
        server.get(nar_url(sample.small) + ".zst")
    with download(server, sample.big):
        answer = run("top", server.url, "--once", "--interval", "200ms")
    assert (answer.returncode, answer.stderr) == (0, "")
    assert f"harmonia at {server.url}: " in answer.stdout
    assert "1 downloads in flight" in answer.stdout
    assert "compressed NARs: 66.7% hits, 1 made, 0 evicted" in answer.stdout
    assert re.search(r"^nar +4 +0\.0 +.* 1 +0$", answer.stdout, re.MULTILINE)
    assert "\x1b" not in answer.stdout


def test_server_of_the_configuration_is_the_default(tmp_path: Path, start: Start) -> None:
    StoreBuilder(tmp_path / "store")
    settings = f"metrics_bind = 'unix:{tmp_path}/metrics'"
    server = start(store=tmp_path / "store", settings=settings)
    answer = run("--config", str(server.config), "top", "--once", "--interval", "0.1")
    assert answer.returncode == 0
    assert f"harmonia at unix:{tmp_path}/metrics: " in answer.stdout
    answer = run("top", server.url, "--once")
    assert answer.returncode == 1
    assert re.fullmatch(r"harmonia: \S+/metrics returns 404; use the address of metrics_bind, .*\n", answer.stderr)


def test_views_are_appended_without_a_terminal(tmp_path: Path, start: Start) -> None:
    StoreBuilder(tmp_path / "store")
    server = start(store=tmp_path / "store")
    command = [*HARMONIA, "top", server.url, "--interval", "0.1"]
    with popen(command, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen: list[str] = []
        reader = threading.Thread(target=seen.extend, args=(process.stdout,))
        reader.start()
        wait_until(lambda: sum(line.startswith("harmonia at") for line in seen) > 2)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 0
        reader.join()
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_unreachable_server_is_waited_for(tmp_path: Path, start: Start) -> None:
    StoreBuilder(tmp_path / "store")
    bind = f"unix:{tmp_path}/socket"
    server = start(store=tmp_path / "store", bind=bind)
    command = [*HARMONIA, "top", bind, "--interval", "0.1"]
    with popen(command, env=os.environ, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen: list[str] = []
        reader = threading.Thread(target=seen.extend, args=(process.stdout,))
        reader.start()
        wait_until(lambda: any(line.startswith("harmonia at") for line in seen))
        server.stop()
        wait_until(lambda: any("check that the server runs" in line for line in seen))
        seen.clear()
        server.start()
        wait_until(lambda: any(line.startswith("harmonia at") for line in seen))
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 0
        reader.join()


@pytest.mark.parametrize("body", [b"<html>", b"up 1\n", b"\xff"])
def test_server_that_is_no_harmonia_is_reported(body: bytes) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        answer = run("top", f"http://127.0.0.1:{server.server_address[1]}", "--once")
        thread.join()
    assert answer.returncode == 1
    assert re.fullmatch(r"harmonia: \S+ has no metrics of Harmonia; use the URL of a Harmonia server\n", answer.stderr)

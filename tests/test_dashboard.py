"""The dashboard's queries give numbers in a real Prometheus that scrapes a real server."""

import http.client
import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from harmonia.metrics.outcome import Outcome
from harmonia.tools.store_builder import StoreBuilder
from support.pages import ROOT
from support.programs import require
from support.running import PATIENCE_S, Server, file_url, pauses, wait_until

Start = Callable[..., Server]

VARIABLES = {"$job": "harmonia", "$instance": ".+", "$__rate_interval": "1m", "$__range": "1h"}
"""Values for the variables in queries: those that Grafana fills in when the dashboard is opened."""


class Prometheus:
    """A Prometheus that scrapes a server ten times a second."""

    def __init__(self, directory: Path, server: Server, port: int) -> None:
        require("prometheus")
        self._port = port
        target = server.url.removeprefix("http://")
        config = {
            "scrape_configs": [
                {"job_name": "harmonia", "scrape_interval": "100ms", "static_configs": [{"targets": [target]}]}
            ]
        }
        (directory / "prometheus.yml").write_text(json.dumps(config))  # YAML includes JSON
        options = [f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data"]
        self.process = subprocess.Popen(
            ["prometheus", *options, f"--web.listen-address=127.0.0.1:{self._port}"], stderr=subprocess.DEVNULL
        )

    def query(self, expression: str) -> list[Any]:
        """Return the result of an instant query, or nothing while Prometheus starts."""
        for variable, value in VARIABLES.items():
            expression = expression.replace(variable, value)
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE_S)
        with closing(connection):
            try:
                connection.request("GET", f"/api/v1/query?{urlencode({'query': expression})}")
            except ConnectionRefusedError:
                assert self.process.poll() is None
                return []
            response = connection.getresponse()
            if response.status == HTTPStatus.SERVICE_UNAVAILABLE:
                return []
            answer = json.load(response)
        assert answer["status"] == "success", (expression, answer)
        return list(answer["data"]["result"])


def panels() -> list[dict[str, Any]]:
    return list(json.loads((ROOT / "docs/grafana-dashboard.json").read_text())["panels"])


@pytest.fixture
def prometheus(start: Start, tmp_path: Path, new_port: Callable[[], int]) -> Iterator[tuple[Prometheus, Server, str]]:
    store = StoreBuilder(tmp_path / "store")
    info = store.add(store.output_path("big"), b"compressible" * 200_000)
    server = start(store=tmp_path / "store")
    running = Prometheus(tmp_path, server, new_port())
    yield running, server, file_url(info)
    running.process.terminate()
    running.process.wait()


def eventually(running: Prometheus, expression: str) -> list[Any]:
    """Return the result of a query as soon as it has one."""
    for _ in pauses(expression):
        if found := running.query(expression):
            return found
    raise AssertionError


def test_four_numbers_come_first_and_every_query_is_valid(prometheus: tuple[Prometheus, Server, str]) -> None:
    running, server, url = prometheus
    assert eventually(running, "harmonia_compression_saved_bytes_total == 0")  # the first scrape shows no increase
    size = len(server.get(url).body)
    wait_until(lambda: any((server.cache_dir / "nar").glob("*quick")))
    server.get(url)
    first = panels()[:4]
    assert [panel["title"] for panel in first] == ["Served", "Saved", "Failing", "Filling"]
    assert {panel["gridPos"]["y"] for panel in first} == {0}
    values = {}
    for panel in first:
        [target] = panel["targets"]
        # Rates become positive with the second scrape after a change.
        above = "" if panel["title"] == "Failing" else " > 0"
        [result] = eventually(running, f"({target['expr']}){above}")
        values[panel["title"]] = float(result["value"][1])
    assert values["Served"] > 0
    assert values["Saved"] > size  # 2.4 MB compress to far less than half
    assert values["Failing"] == 0  # and not "No data"
    assert 0 < values["Filling"] < 0.01
    for panel in panels():
        for target in panel["targets"]:
            running.query(target["expr"])
    [found] = [panel for panel in panels() if panel["title"] == "NARs: sent, by outcome"]
    by_outcome = running.query(found["targets"][0]["expr"])
    assert {each["metric"]["outcome"] for each in by_outcome} == {str(outcome) for outcome in Outcome}

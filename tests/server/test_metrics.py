"""Metrics cover all workers, survive the end of a worker, and have a bounded number of labels."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from harmonia.config.tokens import new
from harmonia.metrics.outcome import Outcome
from harmonia.metrics.shared_counters import BOUNDS, MAX_TOKENS, Histogram, TokenUses
from harmonia.nix.signing import SecretKey
from harmonia.tools.fixture_tree import Sparse
from harmonia.tools.store_builder import StoreBuilder
from support.certificates import authority, issue
from support.programs import require
from support.running import PATIENCE_S, Sample, Server, ServiceManager, nar_url, wait_until

Start = Callable[..., Server]
DOCS = Path(__file__).parents[2] / "docs"


class Scrape(dict[str, float]):
    """The samples by name and label values, such as `harmonia_requests_total nar 200`."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        for family in self.families.values():
            for sample in family.samples:
                self[" ".join([sample.name, *sample.labels.values()])] = sample.value

    def __missing__(self, key: str) -> float:
        return 0


def scrape(server: Server) -> Scrape:
    answer = server.get("/metrics")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    return Scrape(answer.text)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return Sample.make(tmp_path_factory.mktemp("metrics") / "store")


@contextmanager
def stalled(server: Server, path: str) -> Iterator[socket.socket]:
    """Start a download, and stop reading."""
    with server.connect(receive_buffer=4096) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: cache\r\n\r\n".encode())
        assert connection.recv(12) == b"HTTP/1.1 200"
        yield connection


def test_every_worker_reports_the_totals_of_all(start: Start, sample: Sample) -> None:
    server = start(store=sample.root, workers=3)
    sent = sum(len(server.get("/nix-cache-info").body) for _ in range(20))
    for _ in range(10):
        found = scrape(server)
        assert found["harmonia_requests_total cache_info 200"] == 20
        assert found["harmonia_head_seconds_count none cache_info"] == 20
        assert found["harmonia_sent_bytes_total none cache_info"] == sent
    assert found["harmonia_worker_restarts_total"] == 0


def test_killed_worker_keeps_its_counters_and_loses_its_gauges(start: Start, sample: Sample, tmp_path: Path) -> None:
    with ServiceManager(f"{tmp_path}/notify") as manager:
        server = start(store=sample.root, workers=2, environment=manager.environment)
        assert manager.receive() == "READY=1"  # of both workers: one that never served is not replaced at once
    for _ in range(20):
        server.get("/nix-cache-info")
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(stalled(server, nar_url(sample.big)))
        assert scrape(server)["harmonia_requests_in_flight nar"] == 4
        killed = server.workers
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        server.wait_for_log(f"worker {killed[0]} ended by SIGKILL")
        server.wait_for_log(f"worker {killed[1]} ended by SIGKILL")
        wait_until(lambda: scrape(server)["harmonia_worker_restarts_total"] == 2)
        found = scrape(server)
    assert found["harmonia_requests_in_flight nar"] == 0
    assert found["harmonia_requests_total cache_info 200"] == 20


def test_downloads_are_counted(start: Start, sample: Sample) -> None:
    server = start(store=sample.root)
    with stalled(server, nar_url(sample.big)):
        assert scrape(server)["harmonia_requests_in_flight nar"] == 1
    wait_until(lambda: scrape(server)["harmonia_requests_in_flight nar"] == 0)
    server.get(nar_url(sample.small))
    server.head(nar_url(sample.small))
    server.get(nar_url(sample.small), {"Range": "bytes=0-9"})
    wait_until(lambda: scrape(server)["harmonia_requests_total nar 206"])  # counted after its last byte
    found = scrape(server)
    assert found["harmonia_requests_total nar 200"] == 3
    assert found["harmonia_requests_total nar 206"] == 1
    small = sample.small.nar_size + 10
    assert small < found["harmonia_sent_bytes_total store nar"] < small + sample.big.nar_size
    assert found["harmonia_head_seconds_count store nar"] == 3
    assert found["harmonia_head_seconds_count none nar"] == 1  # HEAD reads nothing
    assert found["harmonia_body_seconds_count store nar"] == 2  # a whole small NAR is not streamed
    # A lookup of each path; and the newest path, which a worker reads only if the event loop may read.
    assert found["harmonia_database_seconds_count"] in {2, 3}


def test_cache_and_compression_are_counted(start: Start, sample: Sample) -> None:
    server = start(store=sample.root, settings="cache_size = '1G'", workers=2)
    size = len(server.get(nar_url(sample.big) + ".zst").body)
    wait_until(lambda: scrape(server)["harmonia_cache_fills_total"] == 1)
    server.get(nar_url(sample.big) + ".zst")
    wait_until(lambda: scrape(server)["harmonia_cache_hits_total"] == 1)
    found = scrape(server)
    assert found["harmonia_cache_misses_total"] == 1
    assert found["harmonia_cache_filled_bytes_total"] == size
    assert found["harmonia_cache_limit_bytes"] == 1 << 30
    assert size <= found["harmonia_cache_used_bytes"] < size + 64 * 1024  # in disk blocks
    (server.directory / "cache").rename(server.directory / "away")
    assert math.isnan(scrape(server)["harmonia_cache_used_bytes"])
    assert found["harmonia_encoder_seconds_total"] > 0
    assert found["harmonia_encoder_threads"] >= 2
    assert found["harmonia_encoder_waiting"] == 0
    (killed, _) = server.workers
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: scrape(server)["harmonia_worker_restarts_total"] == 1)
    assert scrape(server)["harmonia_cache_fills_total"] == 1


def test_only_bodies_broken_off_by_the_server_are_counted(start: Start, tmp_path: Path) -> None:
    store = StoreBuilder(tmp_path / "store")
    big = store.add(store.output_path("big"), Sparse(64 << 20))
    server = start(store=tmp_path / "store")
    with stalled(server, nar_url(big)):
        pass
    wait_until(lambda: scrape(server)["harmonia_requests_in_flight nar"] == 0)
    assert scrape(server)["harmonia_broken_bodies_total nar"] == 0
    with stalled(server, nar_url(big)) as connection:
        path = f"{store.real_dir}/{big.path}"
        os.chmod(path, 0o644)
        os.truncate(path, 1000)
        with suppress(ConnectionResetError):
            while connection.recv(1 << 20):
                pass
    server.wait_for_log("breaks off")
    wait_until(lambda: scrape(server)["harmonia_requests_in_flight nar"] == 0)
    found = scrape(server)
    assert found["harmonia_broken_bodies_total nar"] == 1
    assert found["harmonia_broken_bodies_total log"] == 0
    assert found["harmonia_requests_total nar 200"] == 2


def test_refused_connections_are_counted(start: Start, sample: Sample, tmp_path: Path) -> None:
    server = start(store=sample.root, settings=f"metrics_bind = 'unix:{tmp_path}/metrics'\nmax_connections = 1")
    server.settle()
    with stalled(server, nar_url(sample.big)):
        assert [server.get("/version").status for _ in range(3)] == [503] * 3
        server.url = f"unix:{tmp_path}/metrics"
        assert scrape(server)["harmonia_refused_connections_total"] == 3


def test_requests_cannot_create_labels(start: Start, sample: Sample) -> None:
    server = start(store=sample.root)
    before = set(scrape(server))
    for path in ("/a", "/b", "/nar/c", "/%ff", f"/{'0' * 32}.narinfo"):
        server.get(path)
        server.request("DELETE", path)
        server.request("MADEUP", path)
    with server.connect() as connection:
        connection.sendall(b"no HTTP\r\n\r\n")
        connection.recv(100)
    found = scrape(server)
    new = set(found) - before
    assert {label for key in new for label in key.split()[1:]} & {str(outcome) for outcome in Outcome} == {"none"}
    assert {key: found[key] for key in sorted(new) if "harmonia_requests_total" in key} == {
        "harmonia_requests_total metrics 200": 1,
        "harmonia_requests_total nar 404": 1,
        "harmonia_requests_total narinfo 404": 1,
        "harmonia_requests_total unknown 400": 1,
        "harmonia_requests_total unknown 404": 6,
        "harmonia_requests_total unknown 405": 2,
        "harmonia_requests_total unknown 501": 5,
    }


def test_metrics_bind_moves_metrics_to_its_own_address(start: Start, sample: Sample, tmp_path: Path) -> None:
    server = start(store=sample.root, settings=f"metrics_bind = 'unix:{tmp_path}/metrics'\nmax_connections = 1")
    assert server.get("/metrics").status == 404
    public = server.url
    with stalled(server, nar_url(sample.big)):
        server.url = f"unix:{tmp_path}/metrics"
        assert scrape(server)["harmonia_requests_total unknown 404"] == 1
        assert [server.get(path).status for path in ("/", "/nix-cache-info", "/health")] == [404] * 3
    server.url = public
    assert server.stop() == 0
    assert not (tmp_path / "metrics").exists()


def test_metrics_bind_to_an_ip_address(start: Start, sample: Sample) -> None:
    server = start(store=sample.root, settings="metrics_bind = '127.0.0.1:0'")
    server.url = server.wait_for_log("metrics are at (http://.*)/metrics")[1]
    assert scrape(server)["harmonia_worker_restarts_total"] == 0


def test_metrics_false_disables_metrics(start: Start, sample: Sample) -> None:
    assert start(store=sample.root, settings="metrics = false").get("/metrics").status == 404


@pytest.mark.parametrize(
    ("seconds", "bucket"), [(0.0, 0), (BOUNDS[0], 0), (0.0002, 1), (BOUNDS[-1], len(BOUNDS) - 1), (1e9, len(BOUNDS))]
)
def test_bucket_includes_its_upper_bound(seconds: float, bucket: int) -> None:
    cells = memoryview(bytearray(8 * Histogram.size)).cast("d")
    Histogram(cells).observe(seconds)
    assert list(cells).index(1) == bucket
    assert cells[-1] == seconds


# Consumers of the metrics


def promtool(*arguments: str, text: str = "") -> None:
    """Fail if the tool of Prometheus reports an error or warning."""
    require("promtool")
    checked = subprocess.run(
        ["promtool", "check", *arguments], input=text, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert (checked.returncode, checked.stderr) == (0, ""), checked.stdout


def test_promtool_accepts_the_metrics(start: Start, sample: Sample) -> None:
    server = start(store=sample.root)
    server.get(nar_url(sample.small) + ".zst")
    promtool("metrics", text=server.get("/metrics").text)


def test_alerts_fire_for_their_conditions(tmp_path: Path) -> None:
    rules, tests = DOCS / "alerts.yml", Path(__file__).parents[1] / "alerts.yml"
    promtool("rules", str(rules))
    shutil.copy(rules, tmp_path)
    (tmp_path / "tests.yml").write_text(tests.read_text())
    done = subprocess.run(["promtool", "test", "rules", "tests.yml"], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    alerts = re.findall(r"alert: (\w+)", rules.read_text())
    assert set(alerts) == set(re.findall(r"alertname: (\w+)", tests.read_text()))
    assert alerts == re.findall(r"^\| `(\w+)`", (DOCS / "how-to/monitor.md").read_text(), re.MULTILINE)


def of_server(names: Iterable[str]) -> set[str]:
    """Return the names without those of `harmonia watch`, which tests/test_watch.py compares."""
    return {name for name in names if not name.startswith("harmonia_watch_")}


def test_alerts_use_metrics_that_exist(start: Start, sample: Sample, with_all: str) -> None:
    families = scrape(start(store=sample.root, settings=with_all)).families.values()
    names = {name_in_use(family) for family in families}
    assert of_server(re.findall(r"\bharmonia_\w+", (DOCS / "alerts.yml").read_text())) <= names


def test_promtool_accepts_the_expressions_of_the_dashboard(tmp_path: Path) -> None:
    expressions_used = [each.replace("$__rate_interval", "5m").replace("$__range", "6h") for each in expressions()]
    rules = [{"record": f"rule:{number}", "expr": each} for number, each in enumerate(expressions_used)]
    (tmp_path / "rules").write_text(
        json.dumps({"groups": [{"name": "dashboard", "rules": rules}]})
    )  # YAML includes JSON
    promtool("rules", str(tmp_path / "rules"))


def test_processes_of_all_workers_are_summed(start: Start, sample: Sample) -> None:
    one, three = (scrape(start(store=sample.root, workers=workers)) for workers in (1, 3))
    for name in ("process_resident_memory_bytes", "process_virtual_memory_bytes", "process_open_fds"):
        assert three[name] > one[name] > 0
    assert three["process_max_fds"] == one["process_max_fds"]
    assert abs(three["process_start_time_seconds"] - time.time()) < 3600
    assert three["process_cpu_seconds_total"] > 0


def test_store_and_keys_are_shown(start: Start, sample: Sample, with_all: str) -> None:
    found = scrape(start(store=sample.root, settings=with_all))
    paths = [sample.small, sample.big]
    assert found["harmonia_store_paths"] == len(paths)
    assert found["harmonia_store_nar_bytes"] == sum(path.nar_size for path in paths)
    assert found["harmonia_signing_key metrics-1"] == 1
    assert found["harmonia_cache_oldest_use_timestamp_seconds"] == 0


def test_reload_and_certificate_are_shown(start: Start, sample: Sample, tmp_path: Path) -> None:
    require("openssl")
    authority(tmp_path, "ca")
    both = issue(tmp_path, "ca", "cache", days=2)
    both.chmod(0o600)
    server = start(store=sample.root, settings=f"tls_cert_path = '{both}'\ntls_key_path = '{both}'", workers=2)
    found = scrape(server)
    assert 0 < found["harmonia_certificate_expiry_timestamp_seconds"] - time.time() < 2 * 86400
    assert found["harmonia_last_reload_successful"] == 1
    started = found["harmonia_last_reload_success_timestamp_seconds"]
    issue(tmp_path, "ca", "cache", days=9)
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: scrape(server)["harmonia_certificate_expiry_timestamp_seconds"] > time.time() + 8 * 86400)
    reloaded = scrape(server)["harmonia_last_reload_success_timestamp_seconds"]
    assert reloaded > started
    both.write_text("nothing")
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: scrape(server)["harmonia_last_reload_successful"] == 0)
    found = scrape(server)
    assert found["harmonia_last_reload_success_timestamp_seconds"] == reloaded
    assert found["harmonia_certificate_expiry_timestamp_seconds"] > time.time() + 8 * 86400


def test_tokens_are_shown_with_their_end_and_last_use(start: Start, sample: Sample, tmp_path: Path) -> None:
    secret, used = new("used", ["read"], 4102444800.0)
    late, expired = new("expired", ["read"], 1_000_000_000.0)
    _, unused = new("unused", ["read"])
    (tmp_path / "tokens").write_text(f"{used}\n{expired}\n{unused}\n")
    settings = f"tokens_path = '{tmp_path}/tokens'\nanonymous_scopes = ['metrics']"
    server = start(store=sample.root, settings=settings, workers=2)
    before = time.time()
    for each, status in ((secret, 200), (late, 401), ("harmonia_unknown", 401)):
        for _ in range(4):
            assert server.get("/nix-cache-info", {"Authorization": f"Bearer {each}"}).status == status
    found = scrape(server)
    last_use = "harmonia_token_last_use_timestamp_seconds"
    assert before <= found[f"{last_use} used"] <= time.time()
    assert {name: found[f"{last_use} {name}"] for name in ("expired", "unused")} == {"expired": 0, "unused": 0}
    assert {s.labels["name"]: s.value for s in found.families["harmonia_token_expiry_timestamp_seconds"].samples} == {
        "used": 4102444800.0,
        "expired": 1_000_000_000.0,
    }
    (tmp_path / "tokens").write_text(f"{unused}\n")
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: f"{last_use} used" not in scrape(server))


def test_uses_of_more_tokens_than_there_is_room_for_keep_the_most_recent() -> None:
    uses = TokenUses(memoryview(bytearray(8 * TokenUses.size)).cast("d"))
    for number in range(1, 2 * MAX_TOKENS + 1):
        uses.record(number, 1000.0 + number)
    assert uses.by_number() == {number: 1000.0 + number for number in range(MAX_TOKENS + 1, 2 * MAX_TOKENS + 1)}
    uses.record(2 * MAX_TOKENS, 9999.0)
    assert uses.by_number()[2 * MAX_TOKENS] == 9999.0


def test_worker_that_replaces_another_keeps_its_last_uses() -> None:
    cells = memoryview(bytearray(8 * TokenUses.size)).cast("d")
    TokenUses(cells).record(7, 1000.0)
    TokenUses(cells).record(7, 2000.0)
    assert TokenUses(cells).by_number() == {7: 2000.0}


# Metrics of TLS, pushes, the mirror and upstreams exist only with these settings.
WITH_ALL = """
tls_cert_path = '{0}/cache.both'
tls_key_path = '{0}/cache.both'
sign_key_paths = ['{0}/key']
tokens_path = '{0}/tokens'
anonymous_scopes = ['read', 'metrics']
warm = "new"
[push]
enable = true
[mirror]
endpoint = 'http://127.0.0.1:1'
bucket = 'cache'
read = false
write_served = true
[[upstream]]
url = 'http://127.0.0.1:1'
"""


@pytest.fixture(scope="module")
def with_all(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return settings with which all metrics exist."""
    require("openssl")
    directory = tmp_path_factory.mktemp("secrets")
    authority(directory, "ca")
    issue(directory, "ca", "cache")
    (directory / "key").write_text(SecretKey.generate("metrics-1").export())
    (directory / "tokens").write_text(str(new("reader", ["read"], 4102444800.0)[1]))
    for secret in ("key", "cache.both"):
        (directory / secret).chmod(0o600)
    return WITH_ALL.format(directory)


def test_reference_documents_every_metric(start: Start, sample: Sample, with_all: str) -> None:
    manual = (DOCS / "reference/metrics.md").read_text()
    server = start(store=sample.root, settings=with_all)
    exported = {name_in_use(family) for family in scrape(server).families.values()}
    rows = re.findall(r"^\| (`.*?) \|", manual.partition("\n## ")[0], re.MULTILINE)
    documented = {name for row in rows for name in re.findall("`(.*?)`", row)}
    assert documented == exported


def test_migration_guide_translates_metrics_of_the_rust_harmonia(start: Start, sample: Sample) -> None:
    server = start(store=sample.root)
    server.get("/health")
    families = scrape(server).families.values()
    guide = (
        (DOCS / "how-to/migrate.md")
        .read_text()
        .partition("### Monitoring of the Rust Harmonia\n")[2]
        .partition("\n#")[0]
    )
    rows = [line.split(" | ") for line in guide.splitlines() if line.startswith("| `")]
    translated = set(re.findall(r"`(harmonia_[a-z_]+)`", " ".join(now for _, now in rows)))
    assert translated
    assert translated <= {name_in_use(family) for family in families}
    routes = {name for before, now in rows if before.startswith("| `/") for name in re.findall(r"`([a-z_]+)`", now)}
    known = {each.labels["route"] for family in families for each in vars(family)["samples"] if "route" in each.labels}
    assert routes - {"OK", "harmonia"} <= known
    assert len(routes) > 9


def name_in_use(family: object) -> str:
    name, kind = str(vars(family)["name"]), vars(family)["type"]
    return f"{name}_total" if kind == "counter" else name


def expressions() -> list[str]:
    """Return the queries of the dashboard."""
    dashboard = json.loads((DOCS / "grafana-dashboard.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


def test_dashboard_has_a_panel_for_every_metric(start: Start, sample: Sample, with_all: str) -> None:
    server = start(store=sample.root, settings=with_all)
    server.get(nar_url(sample.small), {"Range": "bytes=0-9"})  # streamed, and counted after its last byte
    wait_until(lambda: scrape(server)["harmonia_requests_total nar 206"])
    found = scrape(server)
    families = found.families.values()
    names = {sample.name for family in families for sample in family.samples}
    labels = {label for family in families for sample in family.samples for label in sample.labels}
    expressions_used = of_server(
        name for each in expressions() for name in re.findall(r"(?:harmonia|process)_\w+", each)
    )
    assert expressions_used <= names
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in expressions_used} == {
        name_in_use(family) for family in families
    }
    grouped = {
        label for each in expressions() for by in re.findall(r"by \(([^)]*)\)", each) for label in by.split(", ")
    }
    assert grouped <= labels | {"instance"}

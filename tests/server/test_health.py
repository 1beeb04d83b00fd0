"""`/health` for load balancers: 200 only while store paths can be served."""

from collections.abc import Callable
from pathlib import Path

from harmonia import __version__
from harmonia.tools.store_builder import StoreBuilder
from support.running import Server

Start = Callable[..., Server]


def test_health_is_503_while_database_or_store_cannot_be_read(
    start: Start, store: StoreBuilder, tmp_path: Path
) -> None:
    server = start(store=tmp_path / "store")
    answer = server.get("/health")
    assert (answer.status, answer.body, answer.headers["cache-control"]) == (200, b"OK\n", "no-store")
    for needed in (Path(store.db_path), Path(store.real_dir)):
        needed.rename(tmp_path / "away")
        answer = server.get("/health")
        assert (answer.status, answer.body) == (503, b"Service Unavailable\n")
        assert answer.headers["retry-after"] == "1"
        assert server.head("/health").status == 503
        server.wait_for_log(f"ERROR GET /health: 503, cannot read {needed}")
        (tmp_path / "away").rename(needed)
        assert server.get("/health").status == 200


def test_version_is_one_line(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    store.add_source("path", b"")
    assert start(store=tmp_path / "store").get("/version").text == f"harmonia {__version__}\n"

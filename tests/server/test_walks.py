"""A store path is walked once for all concurrent and later requests, and other requests do not wait for the walk."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from harmonia.tools.store_builder import StoreBuilder
from support.running import Server, nar_url, patched, read_answer

Start = Callable[..., Server]

MANY = 20  # more than there are I/O threads


@pytest.mark.parametrize("resource", ["listing", "range"])
def test_one_walk_serves_all_concurrent_requests_and_survives_disconnects(
    start: Start, store: StoreBuilder, tmp_path: Path, resource: str
) -> None:
    info = store.add(store.output_path("tree"), {f"{number:04}": b"" for number in range(3000)})
    other = store.add(store.output_path("other"), {"file": b""})
    walking = f"""
import logging, os, time
from harmonia.store import tree_reader
walk = tree_reader.walk
def waiting(root):
    if root.endswith(b"tree"):
        logging.getLogger("harmonia").warning("a walk begins")
    while root.endswith(b"tree") and not os.path.exists({str(tmp_path / "go")!r}):
        time.sleep(0.01)
    return walk(root)
tree_reader.walk = waiting
"""
    server = start(store=tmp_path / "store", program=patched(walking))
    target = f"/{info.path.hash_part}.ls" if resource == "listing" else nar_url(info)
    headers = {"Range": "bytes=-99"} if resource == "range" else {}
    lines = [f"GET {target} HTTP/1.1", "Host: cache", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    request = "\r\n".join(lines).encode()
    with ExitStack() as stack:
        waiting = [stack.enter_context(server.connect()) for _ in range(MANY)]
        with server.connect() as impatient:
            impatient.sendall(request)
            server.wait_for_log("a walk begins")
        for connection in waiting:
            connection.sendall(request)
        assert server.get(nar_url(other)).status == 200
        (tmp_path / "go").touch()
        bodies = {read_answer(connection).body for connection in waiting}
    assert bodies == {server.get(target, headers).body}
    assert len([line for line in server.log if "a walk begins" in line]) == 1

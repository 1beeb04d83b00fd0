"""A store path is walked once for all who ask where things are in its NAR, and nobody else waits for that."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from harmonia.tools.store_builder import StoreBuilder
from support.running import Server, nar_url, patched, read_answer

Start = Callable[..., Server]

MANY = 20  # more than there are threads that read


@pytest.mark.parametrize("wanted", ["listing", "range"])
def test_a_walk_is_for_all_and_for_who_comes_back(
    start: Start, store: StoreBuilder, tmp_path: Path, wanted: str
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
    asked = f"/{info.path.hash_part}.ls" if wanted == "listing" else nar_url(info)
    headers = {"Range": "bytes=-99"} if wanted == "range" else {}
    lines = [f"GET {asked} HTTP/1.1", "Host: cache", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
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
    assert bodies == {server.get(asked, headers).body}
    assert len([line for line in server.log if "a walk begins" in line]) == 1

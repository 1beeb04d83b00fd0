"""A bucket on three nodes of SeaweedFS stays whole while one is killed, and while one does not answer."""

import os
import random
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harmonia.tools.store_builder import StoreBuilder
from support import preloaded
from support.mirrors import chain, configure
from support.running import HARMONIA, wait_until
from support.s3_service import S3Service

pytestmark = [pytest.mark.s3, pytest.mark.slow, pytest.mark.timeout(900)]

NODES = 3
PATIENCE_S = 600.0
"""Only a bound against hangs: a command repeats each request to a dead node for a minute."""


class Cluster(S3Service):
    """Three nodes, each with a master and volumes, which keep each file twice, and one gateway for S3."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._masters, self._volumes = self._reserve(NODES), self._reserve(NODES)
        self.nodes = [self._start_node(number) for number in range(NODES)]

    def _start(self, name: str, *arguments: str) -> "subprocess.Popen[bytes]":
        (self._directory / name).mkdir(exist_ok=True)
        with (self._directory / "log").open("ab") as log:
            command = [str(self._program), *arguments, "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
            return subprocess.Popen(command, stdout=log, stderr=log, cwd=self._directory / name)

    @property
    def _peers(self) -> str:
        return ",".join(f"127.0.0.1:{port}" for port in self._masters)

    def _start_node(self, number: int) -> "subprocess.Popen[bytes]":
        return self._start(
            f"node-{number}",
            *("server", "-dir=.", f"-master.port={self._masters[number]}", f"-master.peers={self._peers}"),
            *("-master.defaultReplication=001", "-master.volumeSizeLimitMB=64", "-master.telemetry=false"),
            *(f"-volume.port={self._volumes[number]}", "-volume.max=50"),
        )

    def restart_node(self, number: int) -> None:
        self.nodes[number] = self._start_node(number)

    def close(self) -> None:
        for node in self.nodes:
            node.kill()
            node.wait()
        super().close()

    def launch(self) -> "subprocess.Popen[bytes]":
        _, _, filer, s3 = self._ports
        wait_until(self._is_complete)
        return self._start(
            "filer",
            *("filer", f"-master={self._peers}", f"-port={filer}", "-s3", f"-s3.port={s3}", "-s3.port.iceberg=0"),
            *(f"-s3.config={self._directory}/s3.json", "-defaultReplicaPlacement=001"),
        )

    def _is_complete(self) -> bool:
        """Return True if the masters have a leader that knows all nodes."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._masters[0]}/dir/status", timeout=5) as answer:
                status = answer.read().decode()
        except OSError:
            return False
        return all(f"127.0.0.1:{port}" in status for port in self._volumes)


@contextmanager
def _stopped(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    (tmp_path / "cluster").mkdir()
    cluster = Cluster(tmp_path / "cluster")
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


def test_bucket_stays_whole_while_a_node_is_killed_and_one_does_not_answer(cluster: Cluster, tmp_path: Path) -> None:
    store = StoreBuilder(tmp_path / "store")
    folder = cluster.folder(tmp_path, "private")
    config = configure(store, tmp_path, folder.settings())
    content = random.Random(4)

    def write_until_done(top: str) -> None:
        wait_until(lambda: _begin(config, "-q", top).wait() == 0, PATIENCE_S)
        folder.check_closed()
        assert _begin(config, "verify").wait() == 0

    write_until_done(chain(store, 10)[-1].path)
    large = store.add(store.output_path("large"), content.randbytes(30 << 20))
    writer = _begin(config, "-q", large.path)
    time.sleep(content.uniform(0.2, 1))
    cluster.nodes[2].kill()
    cluster.nodes[2].wait()
    writer.wait()
    folder.check_closed()
    write_until_done(large.path)
    write_until_done(store.add_text("on-two-nodes", b"on two nodes").path)
    cluster.restart_node(2)

    other = store.add(store.output_path("other"), content.randbytes(30 << 20))
    with _stopped(cluster.nodes[1]):
        writer = _begin(config, "-q", other.path)
        time.sleep(5)
    writer.wait()
    write_until_done(other.path)


def _begin(config: str, *arguments: str) -> "subprocess.Popen[bytes]":
    """Start `harmonia mirror`. The captured output has its errors."""
    return preloaded.popen([*HARMONIA, "--config", config, "mirror", *arguments], env=dict(os.environ))

"""kill -9 of writers and servers at random moments leaves a bucket of whole closures, which stock Nix substitutes."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harmonia.nix.path_info import PathInfo
from harmonia.tools.store_builder import StoreBuilder
from support import preloaded
from support.mirrors import KEY, configure, mirror
from support.nix_client import Client
from support.running import HARMONIA, PATIENCE_S, Server, file_url, run
from support.s3_service import Folder

pytestmark = pytest.mark.s3

KILLS = int(os.environ.get("KILLS", "6"))
CHECK_INTERVAL = 10  # kills between two checks of the whole bucket
LARGE_BYTES = 17 << 20  # more than one request takes


class Killer:
    """Kills a process while it writes a new closure, at a random moment."""

    def __init__(self, store: StoreBuilder, config: str, server: Server) -> None:
        self._store = store
        self._config = config
        self._server = server
        self._random = random.Random(23)
        self._shared: PathInfo | None = None
        self.tops: list[str] = []

    def kill(self) -> None:
        top = self._add_closure()
        self._random.choice((self._kill_writer, self._kill_server, self._kill_writing_process))(top)

    def _add_closure(self) -> PathInfo:
        number = len(self.tops)
        size = LARGE_BYTES if number % 20 == 19 else int(10 ** self._random.uniform(2, 6))
        content = self._random.randbytes
        deps = [self._store.add(self._store.output_path(f"dep-{number}"), content(1000))]
        if self._shared is not None:
            deps.append(self._shared)
        self._shared = deps[0]
        references = [dep.path for dep in deps]
        top = self._store.add(self._store.output_path(f"top-{number}"), content(size), references=references)
        self.tops.append(top.path)
        return top

    def _pause(self) -> None:
        time.sleep(self._random.uniform(0, 0.6))

    def _kill_writer(self, top: PathInfo) -> None:
        command = [*HARMONIA, "--config", self._config, "mirror", "-q", top.path]
        writer = preloaded.popen(command, env=dict(os.environ))
        self._pause()
        writer.send_signal(signal.SIGKILL)
        writer.wait(PATIENCE_S)

    def _kill_server(self, top: PathInfo) -> None:
        assert self._server.get(file_url(top)).status == 200
        self._pause()
        self._server.stop(signal.SIGKILL)
        self._server.log.clear()
        self._server.start()

    def _kill_writing_process(self, top: PathInfo) -> None:
        assert self._server.get(file_url(top)).status == 200
        self._pause()
        os.kill(self._server.workers[-1], signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(60 + 10 * KILLS)
def test_bucket_stays_whole_while_writers_and_servers_are_killed(
    client: Client, folder: Folder, tmp_path: Path, start: Callable[..., Server]
) -> None:
    """Set KILLS=200 for a long run."""
    store = StoreBuilder(tmp_path / "store")
    config = configure(store, tmp_path, folder.settings("read = false"))
    mirrored = folder.settings("read = false\nwrite_served = true")
    server = start(store=tmp_path / "store", settings=f"sign_key_paths = ['{tmp_path}/key']\n{mirrored}")
    killer = Killer(store, config, server)
    for number in range(KILLS):
        killer.kill()
        if number % CHECK_INTERVAL == 0:
            folder.check_closed()
    server.stop()
    mirror(config, *killer.tops)
    answer = run("--config", config, "mirror", "verify")
    assert answer.returncode == 0, answer.stdout
    client.settings |= {"substituters": folder.url, "trusted-public-keys": str(KEY.public_key)}
    client.run("nix-store", "--realise", *(f"/nix/store/{top}" for top in killer.tops))
    client.run("nix-store", "--verify-path", *(f"/nix/store/{top}" for top in killer.tops))

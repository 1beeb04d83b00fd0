"""What tests of the running server share: a real process, on a real socket, over a store made for the test."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from running import Server

settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("default")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start servers; each is stopped, and looked at for what it left behind, when the test ends."""
    started: list[Server] = []

    def start(**options: object) -> Server:
        server = Server(tmp_path / f"server-{len(started)}", **options)  # type: ignore[arg-type]
        started.append(server)
        server.start()
        return server

    yield start
    for server in started:
        server.stop()


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the developer's own gets into a test."""
    for name in [
        name for name in os.environ if name.startswith(("NIX_", "SIGN_KEY", "CONFIG_FILE", "LISTEN_", "NOTIFY_"))
    ]:
        monkeypatch.delenv(name)

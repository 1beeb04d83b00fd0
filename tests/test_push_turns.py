"""Imports on the event loop take turns, and none of them waits long for an import that hangs in the Nix daemon."""

import asyncio
from pathlib import Path

import pytest

from harmonia.config.settings import Push, Settings
from harmonia.nix.signing import SecretKey
from harmonia.push.importer import Upload
from harmonia.push.receiver import PushReceiver
from support.daemon_server import DaemonServer
from support.pusher import Pushed
from support.running import wait_until

KEY = SecretKey.generate("key-1")


def test_only_the_first_import_waits_a_second_for_one_that_hangs(tmp_path: Path) -> None:
    settings = Settings(
        cache_dir=str(tmp_path), daemon_socket=str(tmp_path / "socket"), push=Push(state_dir=str(tmp_path))
    )
    receiver = PushReceiver(settings)

    def start(number: int) -> "asyncio.Task[bool]":
        path = Pushed.make(f"path-{number}", b"content", KEY)
        upload = Upload(path.info, "none", path.file_hash)
        return asyncio.create_task(receiver.importer.run_on_loop(upload, lambda _: False))

    async def run(daemon: DaemonServer) -> None:
        hanging = start(0)
        await asyncio.to_thread(wait_until, lambda: daemon.open)
        with pytest.raises(BlockingIOError):
            await start(1)
        next_one = start(2)
        for _ in range(5):
            await asyncio.sleep(0)
        assert isinstance(next_one.exception(), BlockingIOError)
        assert not hanging.done()
        hanging.cancel()
        await asyncio.gather(hanging, return_exceptions=True)

    with DaemonServer(tmp_path / "socket", greet=lambda _: None) as daemon:
        asyncio.run(run(daemon))

"""Imports on the event loop take turns, and wait neither long for one that hangs nor for a slow disk."""

import asyncio
from pathlib import Path

import pytest

from harmonia.config.settings import Settings
from harmonia.config.tables.push import Push
from harmonia.errors import PushRefusedError
from harmonia.nix import base32
from harmonia.nix.signing import SecretKey
from harmonia.nix.store_path import StorePath
from harmonia.process.loop_reads import LoopReads
from harmonia.push.importer import NeedsThreadError, Upload
from harmonia.push.receiver import PushReceiver
from support.daemon_server import DaemonServer
from support.pusher import Pushed
from support.running import wait_until

KEY = SecretKey.generate("key-1")


@pytest.fixture
def receiver(tmp_path: Path) -> PushReceiver:
    push = Push(state_dir=str(tmp_path))
    return PushReceiver(Settings(cache_dir=str(tmp_path), daemon_socket=str(tmp_path / "socket"), push=push))


def start(receiver: PushReceiver, number: int, references: int = 0) -> "asyncio.Task[bool]":
    names = [StorePath(f"{base32.encode(bytes(16) + each.to_bytes(4))}-name") for each in range(references)]
    path = Pushed.make(f"path-{number}", b"content", KEY, tuple(names))
    upload = Upload(path.info, "none", path.file_hash)
    return asyncio.create_task(receiver.importer.run_on_loop(upload, lambda _: False))


def test_only_the_first_import_waits_a_second_for_one_that_hangs(receiver: PushReceiver, tmp_path: Path) -> None:
    async def run(daemon: DaemonServer) -> None:
        hanging = start(receiver, 0)
        await asyncio.to_thread(wait_until, lambda: daemon.open)
        with pytest.raises(NeedsThreadError):
            await start(receiver, 1)
        next_one = start(receiver, 2)
        for _ in range(5):
            await asyncio.sleep(0)
        assert isinstance(next_one.exception(), NeedsThreadError)
        assert not hanging.done()
        hanging.cancel()
        await asyncio.gather(hanging, return_exceptions=True)

    with DaemonServer(tmp_path / "socket", greet=lambda _: None) as daemon:
        asyncio.run(run(daemon))


def test_timeout_of_the_daemon_is_logged(
    receiver: PushReceiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("harmonia.push.connections._TIMEOUT_S", 0.01)

    async def run() -> None:
        with pytest.raises(PushRefusedError):
            await start(receiver, 0)

    with DaemonServer(tmp_path / "socket", greet=lambda _: None):
        asyncio.run(run())
    assert f"Nix daemon at {tmp_path}/socket: timed out; start it" in caplog.text


def test_path_with_many_references_is_not_imported_on_the_event_loop(receiver: PushReceiver) -> None:
    async def run() -> None:
        with pytest.raises(PushRefusedError):  # it gets as far as the daemon, which is missing
            await start(receiver, 0, references=100)
        with pytest.raises(NeedsThreadError):
            await start(receiver, 1, references=1000)

    asyncio.run(run())


def test_spool_on_a_slow_disk_is_not_read_on_the_event_loop(
    receiver: PushReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    monkeypatch.setattr(LoopReads, "allowed", property(lambda _: False))
    monkeypatch.setattr(receiver.spool, "size", reads.append)

    async def run() -> None:
        with pytest.raises(NeedsThreadError):
            await start(receiver, 0)

    asyncio.run(run())
    assert not reads

"""Announcements of siblings, which anyone in the local network can send, cause a bounded amount of work."""

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest
from zeroconf import ServiceStateChange

from harmonia.upstream.siblings import Siblings

ADDED, UPDATED, REMOVED = ServiceStateChange.Added, ServiceStateChange.Updated, ServiceStateChange.Removed


async def nobody(url: str) -> None:
    raise AssertionError(url)


@pytest.mark.parametrize(("name_of", "count"), [(lambda _: "same", 1), (str, 32)], ids=["one service", "many services"])
def test_few_services_are_resolved_at_once(
    name_of: Callable[[int], str], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved: list[str] = []

    async def resolve(_: object, name: str) -> None:
        resolved.append(name)
        await asyncio.Event().wait()

    async def run() -> None:
        siblings = Siblings("us")
        for number in range(100):
            for change in (ADDED, UPDATED, REMOVED):
                siblings.changed(nobody, cast("Any", None), "type", name_of(number), change)
        await asyncio.sleep(0)
        await siblings.close()

    monkeypatch.setattr(Siblings, "_resolve", lambda *arguments: resolve(*arguments[-2:]))
    asyncio.run(run())
    assert resolved == [name_of(number) for number in range(count)]


def test_unexpected_error_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    async def resolve(*_: object) -> str:
        return "http://192.0.2.1:5000"

    async def run() -> None:
        siblings = Siblings("us")
        siblings.changed(nobody, cast("Any", None), "type", "name", ADDED)
        [task] = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.wait([task])
        await siblings.close()

    monkeypatch.setattr(Siblings, "_resolve", resolve)
    asyncio.run(run())
    assert [each.levelname for each in caplog.records if each.exc_info] == ["ERROR"]
    assert "AssertionError: http://192.0.2.1:5000" in caplog.text

"""How far something has come: on terminals only, and without colours where NO_COLOR says so."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def console(*, stderr: bool = False) -> "Console":
    """What colours come out of, where there is somebody to see them. Lines are as long as they are."""
    from rich.console import Console  # noqa: PLC0415 (some 50 ms, which a command in a pipe need not take)

    return Console(stderr=stderr, soft_wrap=True, highlight=False)


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with rate and remaining time on stderr; in its place nothing where that is no terminal.

    What it gives is to be told of bytes that are done, from any thread.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.progress import (  # noqa: PLC0415 (likewise)
        BarColumn,
        DownloadColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    # Lines that are printed meanwhile go above the bar.
    with Progress(*columns, console=console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty()) as shown:
        task = shown.add_task(what, total=total)
        yield lambda size: shown.advance(task, size)

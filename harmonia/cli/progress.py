"""Console output, sizes and progress bars. Bars appear on terminals only; NO_COLOR turns colours off."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def console(*, stderr: bool = False) -> "Console":
    """Return a console that prints colours on terminals only, and never wraps lines."""
    from rich.console import Console  # noqa: PLC0415 (takes about 50 ms: import only if needed)

    return Console(stderr=stderr, soft_wrap=True, highlight=False)


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar with rate and remaining time on stderr, or nothing if stderr is not a terminal.

    Yields a function to call with the number of bytes done since the last call. Threads may call it concurrently.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.progress import (  # noqa: PLC0415 (takes about 50 ms)
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
    # Lines printed meanwhile appear above the bar.
    with Progress(*columns, console=console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty()) as shown:
        task = shown.add_task(what, total=total)
        yield lambda size: shown.advance(task, size)


def byte_size(count: float) -> str:
    """Return a number of bytes with a binary unit, such as 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:  # noqa: PLR2004 (bytes in the next unit)
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"

"""Upload of closures, with progress and failures on the terminal."""

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, closing
from functools import partial

import click

from harmonia import cli
from harmonia.cli import progress
from harmonia.config.settings import Settings
from harmonia.nix.signing import SecretKey
from harmonia.nix.store_path import StorePath
from harmonia.store.store import Store
from harmonia.upload.nar_files import NarFiles
from harmonia.upload.target import Target, TargetUnavailableError
from harmonia.upload.uploader import Outcome, ReferenceFailedError, Uploader

_MAX_REPORTED = 10  # paths that failed


def upload_closure(
    settings: Settings,
    store: Store,
    open_target: Callable[[], Target],
    paths: Sequence[StorePath],
    keys: Sequence[SecretKey],
    jobs: int,
    doing: str,
) -> Counter[str]:
    """Upload the closure of the paths. Return the numbers of paths by outcome: `uploaded`, `there` or `failed`.

    `doing` is the label of the progress bar. Raises TargetError if the target does not answer any more. Ends the
    process if the user interrupts it.
    """
    with closing(NarFiles(settings, store.real_dir)) as nars:
        try:
            open_uploader = partial(Uploader, store, nars=nars, jobs=jobs, keys=keys)
            return asyncio.run(_upload(open_uploader, open_target, paths, store.store_dir, doing))
        except KeyboardInterrupt:
            click.echo("harmonia: interrupted; the same command continues", err=True)
            logging.disable()  # threads still compress NARs into the directory that is removed now
            nars.close()
            os._exit(cli.EXIT_INTERRUPTED)


async def _upload(
    open_uploader: Callable[[Target], Uploader],
    open_target: Callable[[], Target],
    paths: Sequence[StorePath],
    store_dir: str,
    doing: str,
) -> Counter[str]:
    counts: Counter[str] = Counter()
    async with AsyncExitStack() as stack:
        target = open_target()
        stack.push_async_callback(target.close)
        uploader = stack.enter_context(closing(open_uploader(target)))
        await target.check()
        infos, counts["there"] = await uploader.plan(paths)
        advance = stack.enter_context(progress.bar(doing, sum(info.nar_size for info in infos)))
        unavailable: list[TargetUnavailableError] = []

        def finished(path: StorePath, outcome: Outcome) -> None:
            counts["failed" if outcome else "uploaded"] += 1
            if isinstance(outcome, TargetUnavailableError):
                unavailable.append(outcome)
                uploading.cancel()
            elif outcome and not isinstance(outcome, ReferenceFailedError) and counts["failed"] <= _MAX_REPORTED:
                click.echo(f"failed: {store_dir}/{path}: {outcome}", err=True)

        uploading = asyncio.create_task(uploader.upload(infos, finished, advance))
        try:
            await uploading
        except asyncio.CancelledError:
            if unavailable:
                raise TargetUnavailableError(f"{unavailable[0]}; run the same command again to continue") from None
            raise
    return counts

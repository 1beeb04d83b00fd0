"""`harmonia verify`."""

import os
import sys
import time
from contextlib import closing

import click

from harmonia import cli
from harmonia.cli import progress
from harmonia.cli.arguments import Duration
from harmonia.config import loader
from harmonia.store import path_arguments
from harmonia.store.store import Store
from harmonia.tools.verify import Journal, Result, verify

_ORDER = ("corrupt", "missing", "unreadable", "unregistered")


@click.command("verify")
@click.argument("paths", type=cli.PATH, metavar="[PATH]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Verify all valid paths.")
@click.option("-r", "--recursive", is_flag=True, help="Also verify the closure of the PATHs.")
@click.option(
    "--max-age",
    type=Duration(min=0),
    metavar="AGE",
    default="0s",
    help="Skip paths found good within this time, like 12h or 7d.",
)
@click.option(
    "--jobs",
    type=click.IntRange(1, 64),
    metavar="N",
    help="Number of paths to hash at the same time. Default: the number of CPUs.",
)
@click.option(
    "--journal",
    "journal_file",
    type=cli.PATH,
    metavar="FILE",
    help="File that records good paths. Default: `verified` in the cache directory.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print nothing if all paths are good.")
@click.pass_obj
def command(
    config_file: str | None,
    paths: tuple[str, ...],
    *,
    everything: bool,
    recursive: bool,
    max_age: float,
    jobs: int | None,
    journal_file: str | None,
    quiet: bool,
) -> None:
    """Find store paths that are corrupt, missing or unreadable.

    Hashes the files on disk, several paths at a time, and compares them with the database. A journal records good
    paths. With --max-age, an interrupted run continues, and a later run hashes only new paths and those last verified
    longer ago.

    Prints one line on stdout for each bad path, and exits with status 3 if there is one.

    \b
    For cron:  harmonia verify --all --quiet --max-age 30d
    """  # noqa: D301 (click keeps the line breaks after \b)
    if bool(paths) == everything:
        raise click.UsageError("give PATHs or --all, not both")
    settings = loader.read(config_file, os.environ)
    store = Store.of(settings)
    if everything:
        chosen, total = store.valid_paths()
    else:
        infos = [path_arguments.resolve(store, path)[0] for path in paths]
        names = (
            path_arguments.closure(store, [info.path for info in infos]) if recursive else [info.path for info in infos]
        )
        chosen = [f"{store.store_dir}/{name}" for name in dict.fromkeys(names)]
        total = sum(info.nar_size for name in names if (info := store.path_info(name.hash_part)))
    began = time.monotonic()
    done = 0
    wrong: list[Result] = []
    with (
        Journal(journal_file or os.path.join(str(settings.cache_dir), "verified")) as journal,
        progress.bar("verifying", total) as advance,
    ):
        threads = jobs or len(os.sched_getaffinity(0))
        try:
            with closing(verify(store, chosen, journal, max_age=max_age, threads=threads, progress=advance)) as results:
                for result in results:
                    done += 1
                    if result.state != "good":
                        wrong.append(result)
                        click.echo(f"{result.state}: {result.path}: {result.what}")
        except KeyboardInterrupt:
            age = f"{max(int(time.monotonic() - began + max_age) // 60 + 1, 1)}m"
            click.echo(f"harmonia: interrupted; to continue, add --max-age {age}", err=True)
            sys.exit(cli.EXIT_INTERRUPTED)
    if wrong or not quiet:
        counts = {state: sum(result.state == state for result in wrong) for state in _ORDER}
        summary = ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "all good"
        skipped = len(chosen) - done
        skipped_text = f", {skipped} skipped" if skipped else ""
        click.echo(f"{done} paths verified in {time.monotonic() - began:.1f} s{skipped_text}: {summary}", err=True)
    if wrong:
        click.echo("Repair them with: nix-store --repair-path PATH", err=True)
        sys.exit(cli.EXIT_FOUND)

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
@click.option("-r", "--recursive", is_flag=True, help="Verify what the PATHs refer to, too.")
@click.option(
    "--max-age",
    type=Duration(min=0),
    metavar="AGE",
    default="0s",
    help="Leave out what was found good less than this ago: 12h, 7d.",
)
@click.option(
    "--jobs", type=click.IntRange(1, 64), metavar="N", help="Paths to hash at a time; by default, one for each CPU."
)
@click.option(
    "--journal",
    "journal_file",
    type=cli.PATH,
    metavar="FILE",
    help="Where to note what was found good; by default, `verified` in the cache directory.",
)
@click.option("-q", "--quiet", is_flag=True, help="Say nothing if all is good.")
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

    What is on disk is hashed, several paths at a time, and compared with what the database says. A journal keeps what
    was found good: with --max-age, an interrupted run goes on where it stopped, and a later one hashes only what is
    new, or was last hashed longer ago.

    Each path that is wrong is a line on stdout, and the exit status is then 3.

    \b
    For cron:  harmonia verify --all --quiet --max-age 30d
    """  # noqa: D301 (\b is click's mark of lines to be kept)
    if bool(paths) == everything:
        raise click.UsageError("name some paths, or --all of them")
    settings = loader.read(config_file, os.environ)
    store = Store.of(settings)
    if everything:
        chosen, total = store.valid_paths()
    else:
        infos = [path_arguments.named(store, path)[0] for path in paths]
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
        progress.bar("verifying", total) as tell,
    ):
        threads = jobs or len(os.sched_getaffinity(0))
        try:
            with closing(verify(store, chosen, journal, max_age=max_age, threads=threads, progress=tell)) as results:
                for result in results:
                    done += 1
                    if result.state != "good":
                        wrong.append(result)
                        click.echo(f"{result.state}: {result.path}: {result.what}")
        except KeyboardInterrupt:
            age = f"{max(int(time.monotonic() - began + max_age) // 60 + 1, 1)}m"
            click.echo(f"harmonia: interrupted; to go on, add --max-age {age}", err=True)
            sys.exit(cli.EXIT_INTERRUPTED)
    if wrong or not quiet:
        counts = {state: sum(result.state == state for result in wrong) for state in _ORDER}
        found = ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "all good"
        skipped = len(chosen) - done
        left_out = f", {skipped} left out" if skipped else ""
        click.echo(f"{done} paths verified in {time.monotonic() - began:.1f} s{left_out}: {found}", err=True)
    if wrong:
        click.echo("Mend them with: nix-store --repair-path PATH", err=True)
        sys.exit(cli.EXIT_FOUND)

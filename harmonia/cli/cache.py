"""`harmonia cache`."""

import json
import math
import os
import time
from collections.abc import Iterable, Sequence

import click

from harmonia import cli
from harmonia.cache.owner import become_owner
from harmonia.cli.arguments import Duration
from harmonia.cli.progress import byte_size
from harmonia.config import loader, tokens
from harmonia.errors import InvalidPathError
from harmonia.nix import base32
from harmonia.nix.store_path import StorePath
from harmonia.store.path_arguments import hash_part_of
from harmonia.store.store import Store
from harmonia.tools.cached_nars import CachedNar, CachedNars

_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_DRY_RUN = click.option("-n", "--dry-run", is_flag=True, help="Only print what would be removed.")
_QUIET = click.option("-q", "--quiet", is_flag=True, help="Print nothing on success.")


@click.group("cache", no_args_is_help=True)
def command() -> None:
    """List, show and remove the NARs in the cache of the server.

    Safe while the server runs: a file is removed as an eviction removes it, and downloads that read it continue. Run it
    with the server's --config and environment, as root or as the server's user.

    PATH is a store path, its hash part, a symlink to it, or the name of a file in the cache.
    """


@command.command("ls")
@click.argument("paths", type=cli.PATH, metavar="[PATH]...", nargs=-1)
@_JSON
@click.pass_obj
def list_nars(config_file: str | None, paths: Sequence[str], *, as_json: bool) -> None:
    """List the NARs in the cache, the next one to be evicted first.

    Prints the size on disk, the time since the last use, the uses, and the store path; the name of the file if no path
    has this NAR any more. All downloads within a minute are one use, and those in the first minute are none.
    """
    store, nars = _open(config_file)
    found = _choose(store, nars, paths) if paths else nars.find_all() if nars else []
    if as_json:
        _print_json(store, found)
        return
    now = time.time()
    for nar in found:
        uses = "-" if nar.uses is None else nar.uses
        click.echo(f"{byte_size(nar.size):>10}  {_age(now - nar.used_at):>6}  {uses:>5}  {_name(store, nar)}")
    growing = nars.growing() if nars else 0
    total, limit = sum(nar.size for nar in found), f" of {byte_size(nars.cache.limit)}" if nars and not paths else ""
    more = f", {growing} more being filled" if growing and not paths else ""
    click.echo(f"{_count(found)}, {byte_size(total)}{limit}{more}", err=True)


@command.command("show")
@click.argument("paths", type=cli.PATH, metavar="PATH...", nargs=-1, required=True)
@_JSON
@click.pass_obj
def show(config_file: str | None, paths: Sequence[str], *, as_json: bool) -> None:
    """Show what the cache has of PATHs: each file with its size, encoding, hash and last use."""
    store, nars = _open(config_file)
    found = _choose(store, nars, paths)
    if as_json:
        _print_json(store, found, nars)
        return
    for nar in found:
        fields = _fields(store, nar, nars) | {"lastUsed": tokens.format_time(nar.used_at)}
        for name, value in fields.items():
            for text in value if isinstance(value, list) else [value]:
                click.echo(f"{name}: {'unknown' if text is None else text}")
        click.echo()


@command.command("rm")
@click.argument("paths", type=cli.PATH, metavar="PATH...", nargs=-1, required=True)
@_DRY_RUN
@_QUIET
@click.pass_obj
def remove(config_file: str | None, paths: Sequence[str], *, dry_run: bool, quiet: bool) -> None:
    """Remove the NARs of PATHs from the cache.

    Paths with the same NAR share its file. The next download compresses the NAR again, or fetches it again from an
    upstream. Hash, size and frame index of a compressed NAR stay known, as after an eviction. Workers may repeat NARs
    up to 512 KiB from memory for some time.
    """
    store, nars = _open(config_file)
    _remove(store, nars, _choose(store, nars, paths), dry_run=dry_run, quiet=quiet)


@command.command("purge")
@click.option(
    "--older-than",
    type=Duration(min=0),
    metavar="TIME",
    help="Remove NARs that were not used within this time, like 30d.",
)
@click.option("--all", "everything", is_flag=True, help="Remove all NARs.")
@_DRY_RUN
@_QUIET
@click.pass_obj
def purge(config_file: str | None, *, older_than: float | None, everything: bool, dry_run: bool, quiet: bool) -> None:
    """Remove NARs that were not used for some time, or all.

    Also removes what killed servers left unfinished. NARs that are being compressed or fetched stay.
    """
    if (older_than is None) is not everything:
        raise click.UsageError("give either --older-than TIME or --all")
    store, nars = _open(config_file)
    before = None if older_than is None else time.time() - older_than
    found = [nar for nar in (nars.find_all() if nars else []) if before is None or nar.used_at <= before]
    _remove(store, nars, found, unused_since=before, dry_run=dry_run, quiet=quiet)
    if nars and not dry_run:
        nars.cache.sweep()


def _open(config_file: str | None) -> tuple[Store, CachedNars | None]:
    settings = loader.read(config_file, os.environ)
    store = Store.of(settings)
    return store, CachedNars.of(become_owner(settings), store)


def _choose(store: Store, nars: CachedNars | None, paths: Iterable[str]) -> list[CachedNar]:
    """Return the files of PATHs. Raises InvalidPathError if the cache has none for one of them."""
    everything, chosen = nars.find_all() if nars else [], []
    for path in paths:
        name = hash_part_of(store, path) or os.path.basename(path)
        found = [nar for nar in everything if nar.has_name(name)]
        if not found:
            raise InvalidPathError(f"{path!r} is not in the cache; `harmonia cache ls` lists what is")
        chosen += found
    return list(dict.fromkeys(chosen))


def _remove(
    store: Store,
    nars: CachedNars | None,
    found: Iterable[CachedNar],
    *,
    unused_since: float | None = None,
    dry_run: bool,
    quiet: bool,
) -> None:
    removed = [nar for nar in found if dry_run or (nars and nars.remove(nar, unused_since=unused_since))]
    if dry_run:
        for nar in removed:
            click.echo(f"{byte_size(nar.size):>10}  {_name(store, nar)}")
    if not quiet:
        verb = "would be removed" if dry_run else "removed"
        click.echo(f"{_count(removed)}, {byte_size(sum(nar.size for nar in removed))} {verb}", err=True)


def _count(nars: Sequence[CachedNar]) -> str:
    return "1 NAR" if len(nars) == 1 else f"{len(nars)} NARs"


def _name(store: Store, nar: CachedNar) -> str:
    return ", ".join(f"{store.store_dir}/{path}" for path in nar.paths) or nar.key


def _age(seconds: float) -> str:
    """Return a time with its largest unit, such as 3d."""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f}{unit}"
    return "now"


def _fields(store: Store, nar: CachedNar, nars: CachedNars | None = None) -> dict[str, object]:
    """Return what is known of a file. With `nars`, also what its content and the database say."""
    fields: dict[str, object] = {
        "paths": [f"{store.store_dir}/{path}" for path in nar.paths],
        "file": nar.key,
        "from": "upstream" if nar.is_upstream else "store",
        "encoding": nar.encoding,
        "narHash": f"sha256:{nar.nar_hash}" if nar.nar_hash else None,
        "diskSize": nar.size,
        "lastUsed": math.floor(nar.used_at),
        "uses": nar.uses,
    }
    if nars is not None:
        info = nars.file_info(nar)
        fields["fileSize"] = info and info.size
        fields["fileHash"] = info and f"sha256:{base32.encode(info.sha256)}"
        fields["narSize"] = _nar_size(store, nar.paths)
    return fields


def _nar_size(store: Store, paths: Iterable[StorePath]) -> int | None:
    """Return the size of the NAR, or None if no path with it is valid here."""
    for path in paths:
        if (info := store.usable_path_info(path.hash_part)) is not None:
            return info.nar_size
    return None


def _print_json(store: Store, found: Iterable[CachedNar], nars: CachedNars | None = None) -> None:
    click.echo(json.dumps([_fields(store, nar, nars) for nar in found], indent=2))

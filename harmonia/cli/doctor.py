"""`harmonia doctor`."""

import json
import os
import random
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import chain

import click
from rich.text import Text

from harmonia import cli
from harmonia.cli import progress
from harmonia.cli.arguments import Mebibytes, parse_url
from harmonia.config import credentials, loader
from harmonia.config.settings import Settings
from harmonia.config.tables.publish import PublishRules
from harmonia.errors import ConfigError, FormatError, StoreUnavailableError
from harmonia.nix import nix_conf
from harmonia.nix.base32 import ALPHABET
from harmonia.nix.signing import PublicKey
from harmonia.nix.store_path import StorePath, is_hash_part
from harmonia.store.store import Store
from harmonia.tools.doctor import examine, push, tokens
from harmonia.tools.doctor.finding import Finding, once
from harmonia.tools.http_client import MAX_BODY_BYTES, Client

_STYLES = {"ok": "green", "skipped": "dim", "warning": "yellow", "error": "bold red"}
_DIGESTS = re.compile(rf"(?<=\b[{ALPHABET}]{{8}})[{ALPHABET}]{{24,}}\b")  # the digits of a hash after the first 8
_MAX_CANDIDATES = 100  # local paths to look up in the cache, until enough are found


@click.command("doctor")
@click.argument("client", type=parse_url, metavar="[URL]", required=False)
@click.argument("paths", type=cli.PATH, metavar="[PATH]...", nargs=-1)
@click.option(
    "--public-key",
    "public_keys",
    metavar="KEY",
    multiple=True,
    help="Public key for signatures, in addition to the trusted keys of nix.conf. Repeatable.",
)
@click.option(
    "--samples",
    type=click.IntRange(0, 100),
    metavar="N",
    default=3,
    show_default=True,
    help="Number of paths to test if no PATH is given.",
)
@click.option(
    "--largest",
    metavar="MIB",
    type=Mebibytes(1, MAX_BODY_BYTES >> 20),
    default=64,
    show_default=True,
    help="Do not download NARs larger than this many MiB.",
)
@click.option(
    "--store-dir", metavar="DIR", help="Store directory of the clients. Default: the setting `virtual_nix_store`."
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print JSON: url, ok, and findings with check, level, what and remedy.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print warnings and errors only.")
@click.pass_obj
def command(
    config_file: str | None,
    client: Client | None,
    paths: tuple[str, ...],
    *,
    public_keys: tuple[str, ...],
    samples: int,
    largest: int,
    store_dir: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Test a binary cache the way Nix clients use it.

    Reports problems that make clients fail or slow, each with a remedy. Tests nix-cache-info, narinfos, signatures,
    hash and size of NARs, byte ranges, resumption, compression, HEAD, caching headers, the clock and TLS.

    Tests any cache. Without a URL: the local server, including certificate name, signing key and store paths. PATHs are
    store paths that the cache should have (default: some paths of the local store).

    Exits with status 3 if there are errors. Warnings leave it at 0.

    \b
    The local server:  harmonia doctor
    Any cache:         harmonia doctor https://cache.example.org /nix/store/…
    For cron or CI:    harmonia --config FILE doctor --quiet https://cache.example.org
    """  # noqa: D301 (click keeps the line breaks after \b)
    settings = loader.read(config_file, os.environ)
    keys = [*_parse_keys(public_keys), *_own_keys(settings), *nix_conf.trusted_keys(os.environ)]
    directory = store_dir or settings.virtual_nix_store
    named = [_base_name(directory, path) for path in paths]
    count = len(named) or samples
    is_own = client is None
    serves_all = is_own and settings.publish == PublishRules()
    client = client or Client.of(settings)
    findings = once(
        examine(
            client,
            named or _random_paths(settings, count if serves_all else _MAX_CANDIDATES),
            keys,
            store_dir=directory,
            count=count,
            demanded=bool(named) or serves_all,
            largest=largest << 20,
        )
    )
    if is_own:
        pushes = push.check(settings, nix_conf.trusted_keys(os.environ))
        findings = _warn_if_no_key(chain(findings, pushes, tokens.check(settings)), settings)
    failed = _print_json(client, findings) if as_json else _print(findings, quiet=quiet)
    sys.exit(cli.EXIT_FOUND if failed else 0)


def _parse_keys(texts: Iterable[str]) -> list[PublicKey]:
    try:
        return [PublicKey.parse(text) for text in texts]
    except FormatError as error:
        raise click.UsageError(f"--public-key: {error}") from None


def _own_keys(settings: Settings) -> list[PublicKey]:
    try:
        return [key.public_key for key in credentials.secret_keys(settings)]
    except ConfigError:
        return []  # only some users may read the keys


def _warn_if_no_key(findings: Iterable[Finding], settings: Settings) -> Iterator[Finding]:
    """Yield the findings, then a warning if the settings have no signing key.

    The warning is omitted if an error about signatures shows the same, or if the server is unreachable.
    """
    omit = bool(settings.sign_key_paths or settings.publish.signed_by)
    for finding in findings:
        omit |= finding.level == "error" and finding.check in ("connection", "signatures")
        yield finding
    if not omit:
        what = "sign_key_paths is empty: paths built on this machine are served unsigned, and clients reject them"
        remedy = 'create a key with `harmonia keygen NAME`, and set sign_key_paths = ["/…/NAME.secret"]'
        yield Finding("signatures", "warning", what, remedy)


def _base_name(store_dir: str, path: str) -> str:
    name = path.removeprefix(store_dir + "/").partition("/")[0]
    try:
        return name if is_hash_part(name) else StorePath(name)
    except FormatError:
        what = f"PATH {path!r}: expected a store path like {store_dir}/<hash>-<name>, or a hash part"
        raise click.UsageError(what) from None


def _random_paths(settings: Settings, count: int) -> list[str]:
    """Return random local paths. Paths whose trust depends on a signature come first."""
    store = Store.of(settings)
    try:
        paths, _ = store.valid_paths()
        need_signature = store.paths_needing_signatures()
    except StoreUnavailableError:
        return []
    chosen = [path for path in paths if not path.endswith(".drv")]
    random.shuffle(chosen)
    chosen.sort(key=lambda path: path not in need_signature)
    return [path[len(store.store_dir) + 1 :] for path in chosen[:count]]


def _print(findings: Iterable[Finding], *, quiet: bool) -> bool:
    console = progress.console()
    counts = dict.fromkeys(_STYLES, 0)
    for check, level, what, remedy in findings:
        counts[level] += 1
        if quiet and not remedy:
            continue
        line = Text()
        line.append(f"{level:<8}", _STYLES[level])
        line.append(f"{check}: {what if remedy else _DIGESTS.sub('…', what)}")
        console.print(line)
        if remedy:
            console.print(Text(f"        → {remedy}"))
    if not quiet:
        totals = (("error", counts["error"]), ("warning", counts["warning"]), ("check", counts["ok"]))
        errors, warnings, checks = (f"{count} {what}{'s' if count != 1 else ''}" for what, count in totals)
        console.print(Text(f"{errors}, {warnings}, {checks} passed"))
    return bool(counts["error"])


def _print_json(client: Client, findings: Iterable[Finding]) -> bool:
    rows = [finding._asdict() for finding in findings]
    failed = any(finding["level"] == "error" for finding in rows)
    click.echo(json.dumps({"url": client.url, "ok": not failed, "findings": rows}, ensure_ascii=False, indent=2))
    return failed

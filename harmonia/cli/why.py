"""`harmonia why`."""

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

import click
from rich.text import Text

from harmonia import cli
from harmonia.cli import progress
from harmonia.cli.arguments import parse_url
from harmonia.config import credentials, loader
from harmonia.config.settings import Settings
from harmonia.errors import ConfigError, FormatError, InvalidPathError, StoreUnavailableError
from harmonia.nix.base32 import ALPHABET
from harmonia.nix.nix_conf import NixConf
from harmonia.nix.package_name import PackageName
from harmonia.nix.signing import PublicKey
from harmonia.nix.store_path import HASH_PART_LENGTH, StorePath, is_hash_part
from harmonia.store import path_arguments, queries
from harmonia.store.explain import Code, Explainer, Reason, built_instead, decisive
from harmonia.store.publish_policy import PublishPolicy
from harmonia.store.store import Store
from harmonia.tools import installable, verify
from harmonia.tools.http_client import Client
from harmonia.tools.why import LAST, Cache, NixClient, Verdict, why_unlisted

_DERIVED = re.compile(r"([^#]+\.drv)(?:[!^](?:\*|(.*)))?")  # as Nix prints what it will build, and its outputs
_NARINFO = re.compile(f"(?:^|.*/)([{ALPHABET}]{{{HASH_PART_LENGTH}}})[.]narinfo$")  # as Nix names it in errors
_MAX_NAMED = 20
"""Paths with a name that are found, and listed if there are several."""


def _cache_url(url: str) -> str:
    """Return the URL of a cache, with options as in nix.conf. Raises BadParameter if it is malformed."""
    parse_url(url.partition("?")[0])
    return url


@click.command("why")
@click.argument("path", type=cli.PATH, metavar="PATH|INSTALLABLE")
@click.option(
    "--cache",
    "caches",
    type=_cache_url,
    metavar="URL",
    multiple=True,
    help="Binary cache to ask, as a client does, instead of the local server. Repeatable.",
)
@click.option("--substituters", is_flag=True, help="Ask the substituters of nix.conf.")
@click.option(
    "--nix-conf",
    "conf_file",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="Settings of the client: trusted keys and substituters. Default: the files that Nix reads here.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print JSON: path, summary, for each source whether it has the path, and why, and client.",
)
@click.pass_obj
def command(
    config_file: str | None,
    path: str,
    *,
    caches: tuple[str, ...],
    substituters: bool,
    conf_file: str | None,
    as_json: bool,
) -> None:
    """Explain why a path is not substituted.

    PATH is a store path, its hash part, a symlink to it, or the name of a valid path, like hello-2.12 or hello. A
    derivation, like /nix/store/….drv or /nix/store/….drv^dev, stands for its output.
    INSTALLABLE is a flake reference, like nixpkgs#hello, .#app^dev or .: Nix on this machine evaluates it, and builds
    nothing.

    Without --cache and --substituters, explains whether the local server serves the path: not valid, built before, kept
    back by a publish rule, files missing or damaged, not signed, or its closure is incomplete. Also asks its upstreams,
    but not the bucket of [mirror].

    With them, asks those caches as Nix does, with the tokens of netrc-file: reachability, store directory, priority,
    what Nix on this machine remembers, narinfo, signature and trusted keys, NAR, and closure. Also shows if Nix does
    not ask the cache, because nix.conf does not list it or the Nix daemon does not trust this user, and settings of
    nix.conf and of the derivation for which Nix builds the path even if a cache has it.

    Exits with status 3 if the path is not available.

    \b
    On the server:  harmonia why /nix/store/…
    On a client:    harmonia why --substituters /nix/store/…
    For one cache:  harmonia why --cache https://cache.example.org nixpkgs#hello
    """  # noqa: D301 (click keeps the line breaks after \b)
    settings = loader.read(config_file, os.environ)
    conf = NixConf(os.environ, conf_file, by_daemon=True)
    sample = _sample(settings, path)
    client = NixClient.of(conf, settings.virtual_nix_store, _valid(settings))
    asks = bool(caches or substituters)
    if asks:
        listed = [*conf.words("substituters"), *conf.ignored_substituters] if substituters else []
        if substituters and not listed:
            raise click.UsageError("nix.conf has no substituters; use --cache URL")
        verdicts = sorted(_ask(conf, client, [*caches, *listed], sample), key=lambda verdict: verdict.priority)
    else:
        upstreams = (_upstream(settings, number, client, sample) for number in range(len(settings.upstream)))
        verdicts = [_local(settings, sample), *upstreams]
    available = any(decisive(verdict.reasons) is None for verdict in verdicts)
    own = _own(settings, conf, sample, asks=asks)
    (_print_json if as_json else _print)(sample, verdicts, own)
    sys.exit(0 if available else cli.EXIT_FOUND)


def _sample(settings: Settings, text: str) -> str:
    """Return the base name or hash part of the path that `text` names."""
    store = Store.of(settings)
    if derived := _DERIVED.fullmatch(text):
        return _output(store, *derived.groups())
    text = _NARINFO.sub(r"\1", text)
    try:
        return path_arguments.resolve(store, text)[0].path
    except (InvalidPathError, StoreUnavailableError):
        base_name = (store.relative(text) or text).partition("/")[0]
    if is_hash_part(base_name):
        return base_name
    try:
        return StorePath(base_name)
    except FormatError:
        pass
    if installable.is_flake_reference(text):
        return installable.evaluate(text, store.store_dir)
    return _named(store, text)


def _output(store: Store, derivation: str, name: str | None) -> StorePath:
    """Return the path of an output of a valid derivation: `name`, otherwise `out`, otherwise the first.

    Raises UsageError if it is unknown.
    """
    try:
        outputs = queries.named_outputs(store, path_arguments.resolve(store, derivation)[0].path)
    except (InvalidPathError, StoreUnavailableError):
        outputs = {}
    if not outputs:
        what = f"PATH {derivation!r} is a derivation whose outputs are not known here, and caches have outputs"
        raise click.UsageError(f"{what}; give the path of an output")
    chosen = name or ("out" if "out" in outputs else next(iter(outputs)))
    if chosen not in outputs:
        raise click.UsageError(f"PATH: {derivation!r} has no output {chosen!r}; it has {', '.join(outputs)}")
    return outputs[chosen]


def _named(store: Store, name: str) -> StorePath:
    """Return the valid path with this name, or with this name and some version.

    Raises UsageError if there is none, or if there are several.
    """
    found = [listed.path for listed in queries.search(store, name, _MAX_NAMED).shown]
    exact = [path for path in found if path.name == name]
    packages = (path for path in found if not path.is_derivation and PackageName.parse(path.name).name == name)
    named = exact or list(packages)
    if not named:
        what = f"PATH {name!r}: expected a store path like {store.store_dir}/<hash>-<name>, its hash part, its name,"
        raise click.UsageError(f"{what} or a flake reference like nixpkgs#hello")
    if len(named) > 1:
        candidates = " ".join(f"{store.store_dir}/{path}" for path in named)
        raise click.UsageError(f"PATH {name!r} is the name of several valid paths; give one of {candidates}")
    return named[0]


def _valid(settings: Settings) -> frozenset[str]:
    """Return the hash parts of the valid paths of the local store, which a client need not download."""
    store = Store.of(settings)
    try:
        return frozenset(path[len(store.store_dir) + 1 :][:HASH_PART_LENGTH] for path in store.valid_paths()[0])
    except StoreUnavailableError:
        return frozenset()


def _ask(conf: NixConf, client: NixClient, urls: Iterable[str], sample: str) -> Iterator[Verdict]:
    """Yield the verdicts of the caches at `urls`, and whether Nix asks each of them."""
    for url in dict.fromkeys(urls):
        try:
            cache = Cache.parse(url, os.environ.get("NETRC") or conf.netrc_file)
        except FormatError as error:
            remedy = f"nix path-info --store {url} {client.store_dir}/{sample}"
            yield Verdict(url, LAST, [Reason("connection", f"this command cannot ask it: {error}", True, remedy)])
            continue
        verdict = client.ask(cache, sample)
        unlisted = why_unlisted(conf, verdict.url)
        yield verdict._replace(reasons=[*([unlisted] if unlisted else []), *verdict.reasons])


def _local(settings: Settings, sample: str) -> Verdict:
    store = Store.of(settings)
    policy = PublishPolicy.of(settings)
    try:
        keys = [key.public_key for key in credentials.secret_keys(settings)]
    except ConfigError:  # only some users may read the keys
        keys = []
    reasons = list(Explainer(store, policy, keys, settings.logs).explain(sample[:32]))
    if decisive(reasons) is None and (info := store.path_info(sample[:32])) is not None:
        result = verify.check(store, info)
        if result.state != "good":
            remedy = f"nix-store --repair-path {result.path}"
            reasons.append(Reason(Code.DAMAGED, f"its files are {result.state}: {result.what}", True, remedy))
    return Verdict("this server", settings.priority, reasons)


def _own(settings: Settings, conf: NixConf, sample: str, *, asks: bool) -> list[Reason]:
    """Return reasons for which Nix does not ask any cache for the path.

    `asks` is whether this machine is the client. Otherwise, only reasons in the derivation are found.
    """
    reasons = []
    if asks and not conf.is_on("substitute", default=True):
        text = "nix.conf sets substitute = false, so Nix asks no cache"
        reasons.append(Reason(Code.BUILT_INSTEAD, text, remedy="remove that line, or use --option substitute true"))
    if not (asks and conf.is_on("always-allow-substitutes", default=False)):
        with suppress(StoreUnavailableError):
            reasons += filter(None, [built_instead(Store.of(settings), sample[:32])])
    return reasons


def _upstream(settings: Settings, number: int, client: NixClient, sample: str) -> Verdict:
    """Ask an upstream as the server does."""
    upstream = settings.upstream[number]
    source = f"upstream {upstream.url}"
    try:
        authorization = credentials.authorization(settings, number)
    except ConfigError as error:  # only some users may read the file
        return Verdict(source, LAST, [Reason("connection", str(error), True, "run this command as root")])
    keys = [PublicKey.parse(key) for key in upstream.public_keys]
    file = upstream.netrc or upstream.credentials_file
    remedy = f"put a valid token for it into {file}" if file else "set credentials_file for this upstream"
    asking = Client(upstream.url, find_authorization=lambda _: authorization)
    cache = Cache(asking, upstream.priority, token_remedy=remedy)
    return client.trusting(keys).ask(cache, sample)._replace(url=source)


def _print(sample: str, verdicts: Sequence[Verdict], own: Sequence[Reason]) -> None:
    console = progress.console()
    console.print(Text(_summary(sample, verdicts, own)), style="bold")
    for verdict in (*verdicts, *([Verdict("the client's Nix", LAST, own)] if own else [])):
        console.print(Text(verdict.url + (f", priority {verdict.priority}" if verdict.priority < LAST else "")))
        for reason in verdict.reasons:
            mark, style = ("✗", "red") if reason.decides else ("·", "")
            console.print(Text(f"  {mark} {reason.text}"), style=style)
            if reason.remedy:
                console.print(Text(f"      → {reason.remedy}"))


def _summary(sample: str, verdicts: Sequence[Verdict], own: Sequence[Reason]) -> str:
    """Return one sentence: the source of the path, or why there is none, or why Nix does not use it."""
    for verdict in verdicts:
        if decisive(verdict.reasons) is None:
            but = [reason for reason in (*own, *verdict.reasons) if reason.code in (Code.BUILT_INSTEAD, Code.NOT_ASKED)]
            return f"{sample} is available from {verdict.url}{f', but {but[0].text}' if but else ''}."
    causes = [f"{verdict.url}: {reason.text}" for verdict in verdicts if (reason := decisive(verdict.reasons))]
    which = f"of {len(causes)} sources, none provides it; the first is " if len(causes) > 1 else ""
    return f"{sample} is not available: {which}{causes[0]}."


def _print_json(sample: str, verdicts: Sequence[Verdict], own: Sequence[Reason]) -> None:
    sources = [
        {
            "source": verdict.url,
            "priority": verdict.priority,
            "available": decisive(verdict.reasons) is None,
            "reasons": [reason._asdict() for reason in verdict.reasons],
        }
        for verdict in verdicts
    ]
    value = {
        "path": sample,
        "summary": _summary(sample, verdicts, own),
        "sources": sources,
        "client": [reason._asdict() for reason in own],
    }
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))

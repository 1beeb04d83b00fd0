"""Explanation why a Nix client does not download a path from binary caches, asked as the client asks them."""

import os
import sqlite3
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import NamedTuple
from urllib.parse import parse_qsl, quote

from harmonia.config import netrc
from harmonia.config.default_directories import user_cache_dir
from harmonia.errors import FormatError, RemoteError
from harmonia.nix.cache_info import parse as parse_cache_info
from harmonia.nix.narinfo import parse
from harmonia.nix.nix_conf import BOOLEANS, NixConf
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import PublicKey
from harmonia.nix.store_path import StorePath
from harmonia.store.explain import Code, Reason
from harmonia.tools.doctor import cache_info, connection, narinfo
from harmonia.tools.doctor.finding import LOG, Finding, Findings
from harmonia.tools.http_client import Client
from harmonia.untrusted import integer

MAX_CLOSURE_PATHS = 2000
"""Paths of a closure that a cache is asked for."""
_OK = 200
_NEED_CREDENTIALS = (401, 407)
_LACKS = "the cache does not have the path"
_ABSENCES = {  # Nix treats these as "not in this cache"; 2.35 and newer not 401 and 407
    401: "the cache needs a token",
    403: f"{_LACKS}, or does not let this client read it",
    404: _LACKS,
    407: "the proxy needs a user name and a password",
    410: _LACKS,
}
LAST = (1 << 31) - 1
"""The lowest priority: the largest number that Nix reads."""
_JOBS = 8
_NEGATIVE_TTL_S = 3600  # narinfo-cache-negative-ttl, the default of Nix
_MAX_TTL_S = 1 << 40
_ON_SERVER = "run `harmonia why` on the server; for a path of cache.nixos.org, its build may have failed there"
_MEMORIES = ("binary-cache-v6.sqlite", "binary-cache-v7.sqlite", "binary-cache-v8.sqlite")  # of Nix 2.8 to 2.35
_REMEMBERED = """
select NARs.timestamp from NARs join BinaryCaches on BinaryCaches.id = NARs.cache
where rtrim(BinaryCaches.url, '/') = ? and hashPart = ? and not present
"""


class Cache(NamedTuple):
    """A binary cache as it is given to Nix: a URL with options, like `https://cache.example.org?priority=10`."""

    client: Client
    priority: int | None = None
    """Replaces the priority of the cache."""
    is_trusted: bool = False
    """True if its paths need no signature (`trusted`)."""
    token_remedy: str | None = None
    """What to do if the cache wants another token. By default, what `doctor` says."""

    @classmethod
    def parse(cls, url: str, netrc_file: str) -> "Cache":
        """Return the cache, to which requests have the token in `netrc_file`, from which Nix takes it.

        Raises FormatError if the URL is malformed. Raises RemoteError if the netrc file is malformed.
        """
        base, _, query = url.partition("?")
        options = dict(parse_qsl(query))
        find_authorization = partial(netrc.find_authorization, environ={"NETRC": netrc_file})
        client = Client(base, find_authorization=find_authorization)
        priority = integer(options.get("priority", ""), LAST)
        remedy = None
        if os.path.exists(netrc_file) and not os.access(netrc_file, os.R_OK):
            remedy = f"this user cannot read {netrc_file}, from which Nix takes its token: run this command as root"
        return cls(client, priority, BOOLEANS.get(options.get("trusted", ""), False), remedy)


class Verdict(NamedTuple):
    """Reasons of one cache, in the order in which a client meets them."""

    url: str
    priority: int
    reasons: Sequence[Reason]


@dataclass(frozen=True, slots=True)
class NixClient:
    """A Nix client: its settings, and the paths that it has already."""

    keys: Sequence[PublicKey]
    store_dir: str
    negative_ttl_s: int
    needs_signatures: bool
    valid: frozenset[str]
    """Hash parts of the paths in its store."""

    @classmethod
    def of(cls, conf: NixConf, store_dir: str, valid: frozenset[str]) -> "NixClient":
        """Return the client with these settings of Nix, and these valid paths."""
        ttl = integer("".join(conf.words("narinfo-cache-negative-ttl")), _MAX_TTL_S)
        ttl = _NEGATIVE_TTL_S if ttl is None else ttl
        needs_signatures = conf.is_on("require-sigs", default=True)
        return cls(conf.trusted_keys(), store_dir, ttl, needs_signatures, valid)

    def trusting(self, keys: Sequence[PublicKey]) -> "NixClient":
        """Return a client that trusts these keys instead, or needs no signatures if there are none."""
        return replace(self, keys=keys, needs_signatures=bool(keys))

    def ask(self, given: Cache, sample: str) -> Verdict:
        """Ask a cache for a path, a base name or a hash part."""
        cache = given.client
        try:
            answer = cache.get("nix-cache-info")
        except RemoteError as error:
            return Verdict(cache.url, LAST, [_reason(cache, connection.unreachable(cache, error))])
        if refusal := cache_info.refusal(cache, answer, self.store_dir):
            return Verdict(cache.url, LAST, [_reason(cache, _with_remedy(given, answer.status, refusal))])
        stated = integer(parse_cache_info(answer.body).get("Priority", "0"), LAST) or 0
        client = replace(self, needs_signatures=False) if given.is_trusted else self
        reasons = []
        try:
            for finding in client.findings(given, sample):
                reasons.append(_reason(cache, finding))  # noqa: PERF401 (keeps those before an error)
        except RemoteError as error:
            reasons.append(_reason(cache, Finding("connection", "error", str(error), LOG)))
        return Verdict(cache.url, stated if given.priority is None else given.priority, reasons)

    def findings(self, given: Cache, sample: str) -> Findings:
        """Yield what a client finds, up to the first fault for which it gives up. Raises RemoteError."""
        cache = given.client
        name = f"{sample[:32]}.narinfo"
        if (until := remembered_until(cache.url, sample[:32], self.negative_ttl_s, os.environ)) is not None:
            what = f"until {until:%H:%M}, Nix on this machine remembers that the cache does not have the path"
            remedy = "wait, or add --refresh or `--option narinfo-cache-negative-ttl 0` to the Nix command"
            yield Finding("client's memory", "error", what, remedy)
        answer = cache.get(name)
        if answer.status in _ABSENCES:
            what = f"{name} returns {answer.status}: {_ABSENCES[answer.status]}"
            remedy = cache_info.remedy_of(cache, answer.status) if answer.status in _NEED_CREDENTIALS else _ON_SERVER
            yield _with_remedy(given, answer.status, Finding("narinfo", "error", what, remedy))
            return
        if answer.status != _OK:
            what = f"{name} returns {answer.status}: Nix up to 2.31 then ends the whole operation"
            yield Finding("narinfo", "error", what, LOG)
            return
        parts = yield from narinfo.fetch(cache, sample, self.store_dir)
        if parts is None:
            return
        info, file = parts
        trusts = yield from self._signatures(info)
        if (status := cache.get(file.url, stop=1).status) != _OK:
            what = f"its NAR {file.url} returns {status}, although its narinfo is there"
            yield Finding("NAR", "error", what, "upload the path again, or check the server's log")
        yield from (self if trusts else replace(self, needs_signatures=False)).closure(cache, info)

    def _signatures(self, info: PathInfo) -> Generator[Finding, None, bool]:
        """Check the signatures as Nix does. Return True if this client accepts the path."""
        if not self.needs_signatures:
            names = ", ".join(dict.fromkeys(sig.partition(":")[0] for sig in info.sigs)) or "no key"
            yield Finding("signatures", "ok", f"{info.path}: signed by {names}, which is not checked here")
            return True
        finding = narinfo.signatures(info, self.keys, self.store_dir)
        yield finding
        if finding.level == "ok":
            return True
        names = ", ".join(dict.fromkeys(key.name for key in self.keys))
        yield Finding("keys", "ok", f"this client trusts {names}" if names else "this client trusts no key")
        return False

    def closure(self, cache: Client, info: PathInfo) -> Findings:
        """Check that the cache or the client has each path of the closure. Nix gives up if one is missing."""
        seen, layer = {info.path.hash_part}, [info]
        missing: list[str] = []
        with ThreadPoolExecutor(_JOBS) as pool:
            while layer and len(seen) < MAX_CLOSURE_PATHS:
                references = {path for each in layer for path in each.references}
                new = [path for path in sorted(references) if path.hash_part not in seen | self.valid]
                seen.update(path.hash_part for path in new)
                layer = []
                for path, found in zip(new, pool.map(partial(self._info, cache), new), strict=True):
                    if found is None:
                        missing.append(path)
                    else:
                        layer.append(found)
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            what = f"of its closure, {missing[0]}{more} cannot be downloaded from this cache"
            yield Finding("closure", "error", what, f"harmonia why --cache {cache.url} {missing[0][:32]}")
        else:
            which = "first paths" if layer else "paths"
            what = f"{which} of its closure that this client lacks, all in the cache: {len(seen)}"
            yield Finding("closure", "ok", what)

    def _info(self, cache: Client, path: StorePath) -> PathInfo | None:
        """Return the info of a path that this client accepts from the cache, or None."""
        answer = cache.get(f"{path.hash_part}.narinfo")
        if answer.status != _OK:
            return None
        try:
            info, _ = parse(answer.body.decode(errors="surrogateescape"), self.store_dir)
        except FormatError:
            return None
        if self.needs_signatures and narinfo.signatures(info, self.keys, self.store_dir).level != "ok":
            return None
        return info if info.path == path else None


def why_unlisted(conf: NixConf, url: str) -> Reason | None:
    """Return why Nix does not ask the cache at `url`, or None if nix.conf lists it."""

    def has(words: Iterable[str]) -> bool:
        return url in (word.partition("?")[0].rstrip("/") for word in words)

    if has(conf.words("substituters")):
        return None
    remedy = f"add {url} to substituters in /etc/nix/nix.conf"
    if has(conf.ignored_substituters):
        text = f"the Nix daemon ignores {url}, because this user has set it, but is not in trusted-users"
        remedy += ", or to trusted-substituters"
    elif has(conf.words("trusted-substituters")):
        text = f"nix.conf has {url} only in trusted-substituters, so Nix asks it only if a command names it"
        remedy += f", or use --option extra-substituters {url}"
    else:
        text = f"nix.conf does not have {url} in substituters, so Nix does not ask it"
        remedy += f"; users in trusted-users may also use --option extra-substituters {url}"
    return Reason(Code.NOT_ASKED, text, remedy=remedy)


def remembered_until(url: str, hash_part: str, ttl_s: int, environ: Mapping[str, str]) -> datetime | None:
    """Return until when Nix remembers that the cache at `url` does not have a path, or None.

    Reads the caches of this user and of root, for whom the Nix daemon asks. Unreadable ones are skipped.
    """
    directories = (user_cache_dir(environ), "/root/.cache")
    times: list[float] = []
    for file in {os.path.join(directory, "nix", name) for directory in directories for name in _MEMORIES}:
        with suppress(sqlite3.Error), closing(sqlite3.connect(f"file:{quote(file)}?mode=ro", uri=True)) as database:
            times += [row[0] for row in database.execute(_REMEMBERED, (url, hash_part))]
    until = max(times, default=0) + ttl_s
    return datetime.fromtimestamp(until).astimezone() if until > time.time() else None


def _with_remedy(cache: Cache, status: int, refusal: Finding) -> Finding:
    """Return the refusal with the remedy of this cache, if it is for want of a token."""
    if status not in _NEED_CREDENTIALS or cache.token_remedy is None:
        return refusal
    return refusal._replace(remedy=cache.token_remedy)


def _reason(cache: Client, finding: Finding) -> Reason:
    """Return a finding of the doctor about a cache, which the verdict names, as a reason.

    Nix refuses a path whose signature it does not know.
    """
    decides = finding.level == "error" or (finding.check == "signatures" and finding.level == "warning")
    return Reason(finding.check, finding.what.removeprefix(f"{cache.url}: "), decides, finding.remedy)

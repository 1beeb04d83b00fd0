"""Explanation why a Nix client does not download a path from binary caches, asked as the client asks them."""

import os
import sqlite3
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import NamedTuple
from urllib.parse import quote

from harmonia.errors import FormatError, RemoteError
from harmonia.nix.cache_info import parse as parse_cache_info
from harmonia.nix.narinfo import parse
from harmonia.nix.nix_conf import NixConf
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import PublicKey
from harmonia.nix.store_path import StorePath
from harmonia.store.explain import Reason
from harmonia.tools.doctor import cache_info, connection, narinfo
from harmonia.tools.doctor.finding import LOG, Finding, Findings
from harmonia.tools.http_client import Client
from harmonia.untrusted import integer

MAX_CLOSURE_PATHS = 2000
"""Paths of a closure that a cache is asked for."""
_OK = 200
_ABSENT = (401, 403, 404, 407, 410)  # Nix treats these as "not in this cache"; 2.35 and newer not 401 and 407
_LAST = (1 << 31) - 1
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


class Verdict(NamedTuple):
    """Reasons of one cache, in the order in which a client meets them."""

    url: str
    priority: int
    reasons: Sequence[Reason]


@dataclass(frozen=True, slots=True)
class NixClient:
    """A Nix client: the keys that it trusts, its store directory, and the paths that it has already."""

    keys: Sequence[PublicKey]
    store_dir: str
    negative_ttl_s: int
    valid: frozenset[str]
    """Hash parts of the paths in its store."""

    @classmethod
    def of(cls, conf: NixConf, store_dir: str, valid: frozenset[str]) -> "NixClient":
        """Return the client with these settings of Nix, and these valid paths."""
        ttl = integer("".join(conf.words("narinfo-cache-negative-ttl")), _MAX_TTL_S)
        return cls(conf.trusted_keys(), store_dir, _NEGATIVE_TTL_S if ttl is None else ttl, valid)

    def trusting(self, keys: Sequence[PublicKey]) -> "NixClient":
        """Return a client that trusts these keys instead, unless there are none."""
        return replace(self, keys=keys) if keys else self

    def ask(self, caches: Sequence[Client], sample: str) -> list[Verdict]:
        """Ask each cache for a path, a base name or a hash part. Return the verdicts in the order of Nix's requests."""
        verdicts = [self._verdict(cache, sample) for cache in caches]
        return sorted(verdicts, key=lambda verdict: verdict.priority)

    def _verdict(self, cache: Client, sample: str) -> Verdict:
        try:
            answer = cache.get("nix-cache-info")
        except RemoteError as error:
            return Verdict(cache.url, _LAST, [_reason(cache, connection.unreachable(cache, error))])
        if refusal := cache_info.refusal(cache, answer, self.store_dir):
            return Verdict(cache.url, _LAST, [_reason(cache, refusal)])
        priority = integer(parse_cache_info(answer.body).get("Priority", "0"), _LAST) or 0
        reasons = []
        try:
            for finding in self._findings(cache, sample):
                reasons.append(_reason(cache, finding))  # noqa: PERF401 (keeps those before an error)
        except RemoteError as error:
            reasons.append(_reason(cache, Finding("connection", "error", str(error), LOG)))
        return Verdict(cache.url, priority, reasons)

    def _findings(self, cache: Client, sample: str) -> Findings:
        """Yield what a client finds, up to the first fault for which it gives up. Raises RemoteError."""
        name = f"{sample[:32]}.narinfo"
        if (until := remembered_until(cache.url, sample[:32], self.negative_ttl_s, os.environ)) is not None:
            what = f"until {until:%H:%M}, Nix on this machine remembers that the cache does not have the path"
            remedy = "wait, or add --refresh or `--option narinfo-cache-negative-ttl 0` to the Nix command"
            yield Finding("client's memory", "error", what, remedy)
        answer = cache.get(name)
        if answer.status in _ABSENT:
            yield Finding(
                "narinfo", "error", f"{name} returns {answer.status}: the cache does not have the path", _ON_SERVER
            )
            return
        if answer.status != _OK:
            what = f"{name} returns {answer.status}: Nix up to 2.31 then ends the whole operation"
            yield Finding("narinfo", "error", what, LOG)
            return
        parts = yield from narinfo.fetch(cache, sample, self.store_dir)
        if parts is None:
            return
        info, file = parts
        yield narinfo.signatures(info, self.keys, self.store_dir)
        if (status := cache.get(file.url, stop=1).status) != _OK:
            what = f"its NAR {file.url} returns {status}, although its narinfo is there"
            yield Finding("NAR", "error", what, "upload the path again, or check the server's log")
        yield from self._closure(cache, info)

    def _closure(self, cache: Client, info: PathInfo) -> Findings:
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
        accepted = info.path == path and narinfo.signatures(info, self.keys, self.store_dir).level == "ok"
        return info if accepted else None


def remembered_until(url: str, hash_part: str, ttl_s: int, environ: Mapping[str, str]) -> datetime | None:
    """Return until when Nix remembers that the cache at `url` does not have a path, or None.

    Reads the caches of this user and of root, for whom the Nix daemon asks. Unreadable ones are skipped.
    """
    home = environ.get("XDG_CACHE_HOME") or os.path.join(environ.get("HOME") or "/nonexistent", ".cache")
    times: list[float] = []
    for file in {os.path.join(where, "nix", name) for where in (home, "/root/.cache") for name in _MEMORIES}:
        with suppress(sqlite3.Error), closing(sqlite3.connect(f"file:{quote(file)}?mode=ro", uri=True)) as database:
            times += [row[0] for row in database.execute(_REMEMBERED, (url, hash_part))]
    until = max(times, default=0) + ttl_s
    return datetime.fromtimestamp(until).astimezone() if until > time.time() else None


def _reason(cache: Client, finding: Finding) -> Reason:
    """Return a finding of the doctor about a cache, which the verdict names, as a reason.

    Nix refuses a path whose signature it does not know.
    """
    decides = finding.level == "error" or (finding.check == "signatures" and finding.level == "warning")
    return Reason(finding.check, finding.what.removeprefix(f"{cache.url}: "), decides, finding.remedy)

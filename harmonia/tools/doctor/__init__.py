"""Checks of any binary cache from a Nix client's point of view. Each problem found has a remedy.

The checks follow from the behaviour of Nix clients (docs/reference/http-api.md): their parsers, their resumption of
downloads, their caching of narinfos for 30 days.
"""

from collections.abc import Iterable, Sequence

from harmonia.errors import RemoteError
from harmonia.nix.cache_info import parse
from harmonia.nix.signing import PublicKey
from harmonia.tools.doctor import cache_info, closure, connection, nar, narinfo
from harmonia.tools.doctor.answer import head
from harmonia.tools.doctor.finding import LOG, Finding, Findings
from harmonia.tools.http_client import Client

_OK = 200
_ABSENT = (
    "check that the path is in the store and that no [publish] rule blocks it; for a static cache, `nix copy` it there"
)


def examine(
    client: Client,
    samples: Iterable[str],
    keys: Sequence[PublicKey],
    *,
    store_dir: str,
    count: int,
    demanded: bool,
    largest: int,
) -> Findings:
    """Yield findings in the order of a client's requests.

    `samples` are base names or hash parts of store paths. The first `count` of them that the cache has are tested. If
    `demanded`, a missing sample is an error. NARs larger than `largest` bytes are not downloaded.
    """
    try:
        answer = client.get("nix-cache-info")
    except RemoteError as error:
        yield connection.unreachable(client, error)
        return
    if refusal := cache_info.refusal(client, answer, store_dir):
        yield refusal
        return
    yield from connection.tls(client, answer)
    yield from connection.clock(answer)
    yield from _guarded("cache info", cache_info.check(client, answer, store_dir))
    yield from _guarded("missing paths", cache_info.missing(client))
    suffix = parse(answer.body).get("ClosureV1")
    tested = missed = 0
    for sample in samples:
        if tested >= count:
            break
        try:
            exists = client.get(f"{sample[:32]}.narinfo").status == _OK
        except RemoteError:
            exists = True  # _sample reports the error
        if exists:
            tested += 1
            yield from _guarded("narinfo", _sample(client, sample, keys, store_dir, largest, suffix))
        elif demanded:
            missed += 1
            yield Finding("narinfo", "error", f"{sample} is not in the cache", _ABSENT)
    if count and not tested and not missed:
        yield Finding(
            "samples",
            "warning",
            "found no path that this cache has, so narinfos and NARs were not tested",
            "name some of the cache's paths: harmonia doctor URL /nix/store/…",
        )


def _guarded(check: str, findings: Findings) -> Findings:
    try:
        yield from findings
    except RemoteError as error:
        yield Finding(check, "error", str(error), LOG)


def _sample(
    client: Client, sample: str, keys: Sequence[PublicKey], store_dir: str, largest: int, suffix: str | None
) -> Findings:
    parsed = yield from narinfo.fetch(client, sample, store_dir)
    if parsed is None:
        return
    info, file = parsed
    yield narinfo.signatures(info, keys, store_dir)
    yield from head(client, f"{info.path.hash_part}.narinfo")
    yield from _guarded("NAR", nar.check(client, info, file, largest))
    if suffix is not None:
        yield from _guarded("closure", closure.check(client, info, suffix, store_dir))

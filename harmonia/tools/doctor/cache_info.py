"""Checks of `nix-cache-info`, and of the response for a missing path."""

from harmonia.nix.cache_info import parse
from harmonia.tools.doctor.answer import head, max_age
from harmonia.tools.doctor.connection import https_remedy
from harmonia.tools.doctor.finding import LOG, Finding, Findings
from harmonia.tools.http_client import Answer, Client
from harmonia.untrusted import excerpt, integer

_MAX_PRIORITY = (1 << 31) - 1  # Nix parses it as an `int`
_OK, _BAD_REQUEST, _UNAUTHORIZED, _MISSING = 200, 400, 401, 404
_NEGATIVE_TTL_S = 3600  # narinfo-cache-negative-ttl, the default of Nix
_BEHIND = "check that the server behind the proxy runs, that the proxy has its right address, and the logs of both"
_NO_CACHE = {
    403: "allow reading; a token needs the scope read",
    404: "check the URL and its path; a static cache needs a file nix-cache-info",
    407: "configure user name and password for the proxy",
    429: "wait a minute, and find the client that sends too many requests",
    502: _BEHIND,
    503: _BEHIND,
    504: _BEHIND,
}


def refusal(client: Client, answer: Answer, store_dir: str) -> Finding | None:
    """Return why clients do not accept this URL as a cache, or None. No other check makes sense then."""
    if answer.status != _OK:
        what = f"nix-cache-info returns {answer.status}: clients do not accept this as a binary cache"
        remedy = remedy_of(client, answer.status)
    elif answer.body.lstrip().startswith(b"<"):
        what = "nix-cache-info is a web page: of another site, or of a login in front of the cache"
        remedy = "check the URL; a login page must not intercept requests of Nix clients"
    elif (stated_dir := parse(answer.body).get("StoreDir", store_dir)) != store_dir:
        what = f"the cache is for the store {stated_dir}, not {store_dir}"
        remedy = f"set StoreDir to {store_dir}, or test as a client of that store with --store-dir {stated_dir}"
    else:
        return None
    return Finding("cache info", "error", what, remedy)


def remedy_of(client: Client, status: int) -> str:
    """Return the remedy for a cache that answers with an error."""
    if status == _BAD_REQUEST and (remedy := https_remedy(client)):
        return remedy
    if status == _UNAUTHORIZED and client.has_credentials:
        return f"replace the token for {client.host} in the netrc: the server rejects it; `harmonia token` creates one"
    if status == _UNAUTHORIZED:
        line = f"machine {client.host} login x password TOKEN"
        return f"add a token to /etc/nix/netrc, or to the file of $NETRC, readable to you: {line}"
    return _NO_CACHE.get(status, LOG)


def check(client: Client, answer: Answer, store_dir: str) -> Findings:
    stated = parse(answer.body)
    stated_dir = stated.get("StoreDir")
    if stated_dir is None:
        yield Finding(
            "cache info",
            "warning",
            "no StoreDir: clients of any store use this cache",
            f"add the line `StoreDir: {store_dir}`",
        )
    if integer(stated.get("Priority", "0"), _MAX_PRIORITY) is None:
        what = f"Priority {excerpt(stated['Priority'])} is not a number: clients fail with `stoi`"
        remedy = "use a number: cache.nixos.org has 40, and caches with lower numbers are asked first"
        yield Finding("cache info", "error", what, remedy)
    if stated.get("WantMassQuery") != "1":
        what = "WantMassQuery is not 1: commands like `nix-env -qas` do not ask this cache"
        yield Finding("cache info", "warning", what, "add the line `WantMassQuery: 1`")
    priority = stated.get("Priority", "0, asked before all others")
    yield Finding("cache info", "ok", f"a binary cache for {stated_dir or 'any store'}, priority {priority}")
    yield from head(client, "nix-cache-info")


def missing(client: Client) -> Findings:
    check, path = "missing paths", f"{'0' * 32}.narinfo"
    answer, by_head = client.get(path), client.get(path, method="HEAD")
    remedy = "return 404 for missing paths, to HEAD and GET: some clients fail on any other status"
    if answer.status != by_head.status:
        yield Finding(check, "error", f"GET returns {answer.status}, but HEAD {by_head.status}", remedy)
    elif answer.status == _MISSING:
        yield Finding(check, "ok", "a missing path returns 404")
    elif answer.status in (403, 410):
        yield Finding(check, "warning", f"a missing path returns {answer.status}, as on S3", remedy)
    else:
        yield Finding(check, "error", f"a missing path returns {answer.status}", remedy)
    if answer.status != _OK and max_age(answer) > _NEGATIVE_TTL_S:
        what = f"a 404 may be cached for {max_age(answer)} s: new paths appear that late"
        yield Finding(check, "warning", what, "send `Cache-Control: no-store` with each 404")

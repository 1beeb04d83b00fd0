"""`nix-cache-info`, and how a cache says that it does not have a path."""

from harmonia.tools.doctor.answer import head, max_age
from harmonia.tools.doctor.connection import secure
from harmonia.tools.doctor.finding import LOG, Finding, Findings
from harmonia.tools.http_client import Answer, Client
from harmonia.untrusted import excerpt, integer

_MAX_PRIORITY = (1 << 31) - 1  # of an `int`, which Nix makes of it
_OK, _BAD_REQUEST, _UNAUTHORIZED, _MISSING = 200, 400, 401, 404
_NEGATIVE_TTL_S = 3600  # seconds; Nix remembers no longer that a path is missing
_BEHIND = "see that the server behind the proxy runs, that the proxy looks for it in the right place, and what they log"
_NO_CACHE = {
    403: "let everybody read; a token needs the scope read",
    404: "check the URL, and its path; a directory of files needs one named nix-cache-info",
    407: "give the proxy a user's name and password",
    429: "wait a minute, and see who asks so much",
    502: _BEHIND,
    503: _BEHIND,
    504: _BEHIND,
}


def refusal(client: Client, answer: Answer, store_dir: str) -> Finding | None:
    """Why clients take this for no cache of theirs at all. There is nothing else to say of it then."""
    if answer.status != _OK:
        what = f"nix-cache-info answers {answer.status}: clients do not take this for a binary cache"
        remedy = _remedy(client, answer.status)
    elif answer.body.lstrip().startswith(b"<"):
        what = "nix-cache-info is a web page: that of another site, or of a login in front of the cache"
        remedy = "check the URL; a login must let through what clients of Nix ask for"
    elif (found := _fields(answer).get("StoreDir", store_dir)) != store_dir:
        what = f"it is for the store {found}, not {store_dir}"
        remedy = f"set it to {store_dir}, or use --store-dir {found} for a client of that store"
    else:
        return None
    return Finding("cache info", "error", what, remedy)


def _remedy(client: Client, status: int) -> str:
    if status == _BAD_REQUEST and (remedy := secure(client)):
        return remedy
    if status == _UNAUTHORIZED and client.brings_token:
        return f"give {client.host} another token in the netrc: this one is not let in; harmonia token makes one"
    if status == _UNAUTHORIZED:
        line = f"machine {client.host} login x password TOKEN"
        return f"put its token into /etc/nix/netrc, or the file that $NETRC names, readable to you: {line}"
    return _NO_CACHE.get(status, LOG)


def check(client: Client, answer: Answer, store_dir: str) -> Findings:
    fields = _fields(answer)
    found = fields.get("StoreDir")
    if found is None:
        yield Finding("cache info", "warning", "no StoreDir: clients take any", f"add the line `StoreDir: {store_dir}`")
    if integer(fields.get("Priority", "0"), _MAX_PRIORITY) is None:
        what = f"Priority {excerpt(fields['Priority'])} is not a number: clients fail with `stoi`"
        remedy = "make it a number: 40 is that of cache.nixos.org, less is asked earlier"
        yield Finding("cache info", "error", what, remedy)
    if fields.get("WantMassQuery") != "1":
        what = "WantMassQuery is not 1: `nix-env -qas` and the like do not ask this cache"
        yield Finding("cache info", "warning", what, "add the line `WantMassQuery: 1`")
    priority = fields.get("Priority", "0, which is before all others")
    yield Finding("cache info", "ok", f"a binary cache for {found or 'any store'}, priority {priority}")
    yield from head(client, "nix-cache-info")


def _fields(answer: Answer) -> dict[str, str]:
    lines = answer.body.decode(errors="replace").splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def missing(client: Client) -> Findings:
    check, path = "missing paths", f"{'0' * 32}.narinfo"
    answer, by_head = client.get(path), client.get(path, method="HEAD")
    remedy = "answer 404, to HEAD as to GET, for what is not there: with anything else, some clients give up"
    if answer.status != by_head.status:
        yield Finding(check, "error", f"GET answers {answer.status}, and HEAD {by_head.status}", remedy)
    elif answer.status == _MISSING:
        yield Finding(check, "ok", "a path that is not there is a plain 404")
    elif answer.status in (403, 410):
        yield Finding(check, "warning", f"a path that is not there is answered {answer.status}, as S3 does", remedy)
    else:
        yield Finding(check, "error", f"a path that is not there is answered {answer.status}", remedy)
    if answer.status != _OK and max_age(answer) > _NEGATIVE_TTL_S:
        what = f"that something is missing may be remembered for {max_age(answer)} s: new paths appear as late"
        yield Finding(check, "warning", what, "send `Cache-Control: no-store` with each 404")

"""Check of a closure, which another Harmonia requests instead of one narinfo after the other."""

from harmonia.errors import FormatError
from harmonia.nix import narinfo
from harmonia.nix.path_info import PathInfo
from harmonia.tools.doctor.finding import Finding, Findings
from harmonia.tools.http_client import Client

_OK, _MISSING = 200, 404


def check(client: Client, info: PathInfo, suffix: str, store_dir: str) -> Findings:
    """Check the closure of a path. `suffix` is what `nix-cache-info` announces."""
    name = info.path.hash_part + suffix
    answer = client.get(name)
    if answer.status == _MISSING:
        yield Finding("closure", "skipped", f"{info.path}: its closure has too many paths for one response")
        return
    if answer.status != _OK:
        remedy = "look for the cause in the server's log, and check that the proxy in front of it forwards the URL"
        yield Finding("closure", "error", f"{name} returns {answer.status}, but ClosureV1 announces it", remedy)
        return
    try:
        paths = [narinfo.parse(text, store_dir)[0] for text in narinfo.split(answer.body.decode())]
    except (FormatError, UnicodeDecodeError) as error:
        yield Finding("closure", "error", f"{name}: {error}", "send narinfos, separated by empty lines")
        return
    if not paths or paths[-1].path != info.path:
        remedy = "send references first; if a proxy changes the body, let it pass .closure unchanged"
        yield Finding("closure", "error", f"{name} does not end with the narinfo of {info.path}", remedy)
        return
    absent = {reference for path in paths for reference in path.references} - {path.path for path in paths}
    if absent:
        what = f"{info.path}: {min(absent)} is missing in its closure, so clients build it or get it elsewhere"
        yield Finding("closure", "warning", what, "check that no [publish] rule blocks it: harmonia why PATH")
    else:
        yield Finding("closure", "ok", f"{info.path}: one response has all {len(paths)} narinfos of its closure")

"""Requests of every kind for paths that [publish] rules deny, also after a restart that adds the rules."""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.attack.arena import Arena, Outcome, restart
from support.contract import ABOUT_PATHS, filled, stock
from support.running import Answer, Server

_RULES = "[publish]\ndeny = ['tree', 'plain', 'packed']"
_BROWSE = "browse = true\nmax_query_rate = 0"
_NONE = "0" * 32
_HEADERS: list[dict[str, str]] = [
    {},
    {"Range": "bytes=0-0"},
    {"Range": "bytes=-1"},
    {"If-None-Match": "*"},
    {"If-Modified-Since": "Thu, 01 Jan 1970 00:00:01 GMT"},
    {"Accept-Encoding": "zstd"},
]
_QUERIES = ("tree", "plain", "packed", "e")


def held_back(arena: Arena) -> None:
    with tempfile.TemporaryDirectory(prefix="harmonia-") as directory:
        hashes = stock(Path(directory))
        settings = f"{_BROWSE}\n{_RULES}"
        with arena.served(
            "paths denied by [publish], requested from every resource", settings, root=Path(directory)
        ) as (server, outcome):
            _require_hidden(server, outcome, hashes)


def rules_after_restart(arena: Arena) -> None:
    """Serve everything, restart with rules and the same cache, and ask again."""
    with tempfile.TemporaryDirectory(prefix="harmonia-") as directory:
        hashes = stock(Path(directory))
        name = "[publish] rules added by a restart with a filled cache"
        with arena.served(name, _BROWSE, root=Path(directory)) as (server, outcome):
            before = {path: server.get(path) for path, _, _ in _questions(hashes)}
            server.stop()
            server.config.write_text(f"{server.config.read_text()}\n{_RULES}\n")
            restart(server)
            _require_hidden(server, outcome, hashes)
            for path, answer in before.items():
                outcome.counts["served before"] += answer.status == 200
                if etag := answer.headers.get("etag"):
                    status = server.get(path, {"If-None-Match": etag}).status
                    outcome.require(status == 404, f"{path} with its old ETag: {status}")


def _questions(hashes: Mapping[str, str]) -> Iterator[tuple[str, str, Mapping[str, str]]]:
    """Yield the path of each request, the same request for a path that does not exist, and headers."""
    none = {**hashes, "hash": _NONE, "plain": f"{_NONE}-n.drv", "packed": f"{_NONE}-n.drv"}
    for row in ABOUT_PATHS:
        for headers in _HEADERS:
            yield filled(row, dict(hashes)), filled(row, none), headers


def _require_hidden(server: Server, outcome: Outcome, hashes: Mapping[str, str]) -> None:
    """Require that responses for denied paths equal those for paths that do not exist."""
    for path, none, headers in _questions(hashes):
        for method in ("GET", "HEAD"):
            answer = server.request(method, path, headers)
            outcome.counts[str(answer.status)] += 1
            outcome.require(_is_missing(answer), f"{method} {path} {headers}: {answer.status}")
            outcome.require(answer == server.request(method, none, headers), f"{method} {path} {headers} differs")
    for query in (*_QUERIES, hashes["hash"], hashes["hash"][:8]):
        found = server.get(f"/search?q={query}").text
        outcome.counts["searches"] += 1
        outcome.require("0 paths for" in found, f"/search?q={query} finds something")


def _is_missing(answer: Answer) -> bool:
    return answer.status == 404


ALL = [held_back, rules_after_restart]

"""Attacks on pages for people that are large or costly to make, more of them than the server keeps."""

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.attack.arena import Arena
from benchmarks.attack.client import Request, going_on, hammer
from benchmarks.attack.stores import add_small
from harmonia.tools.store_builder import StoreBuilder

_CONNECTIONS = 16
_TEXTS = 64
_LINE = b"<html> & a line of a text\n"  # each < and & takes more bytes on the page
_ROOTS = 100
_CLOSURE_PATHS = 10_000  # the most for which a page has a tree
_REFERENCES = 10
_SETTINGS = "browse = true\nmax_query_rate = 0"


def texts(arena: Arena) -> None:
    with tempfile.TemporaryDirectory(prefix="harmonia-") as directory:
        builder = StoreBuilder(directory)
        files = {f"{number:02}.txt": _LINE * 11_000 for number in range(_TEXTS)}
        info = builder.add(builder.output_path("texts"), files)
        requests: list[Request] = [(f"/serve/{info.path.hash_part}/{name}?view", {}) for name in files]
        _hammer(arena, builder, f"{_TEXTS} texts of 10,000 lines with ?view", requests)


def closures(arena: Arena) -> None:
    with tempfile.TemporaryDirectory(prefix="harmonia-") as directory:
        builder = StoreBuilder(directory)
        roots = [builder.add_text(f"root-{number}", b"") for number in range(_ROOTS)]
        _add_closure(builder, [f"/nix/store/{root.path}" for root in roots])
        requests: list[Request] = [(f"/path/{root.path.hash_part}", {}) for root in roots]
        _hammer(arena, builder, f"{_ROOTS} pages of paths with closures of {_CLOSURE_PATHS:,} paths", requests)


def _add_closure(builder: StoreBuilder, roots: Sequence[str]) -> None:
    """Add rows of paths without files, and references to them from the roots and from each other."""
    chance = random.Random(1)
    first = _ROOTS + 1
    last = first + _CLOSURE_PATHS - 1  # with the root, one path less
    rows = [(number, f"/nix/store/{builder.output_path(f'part-{number}')}") for number in range(first, last)]
    references = [
        (number, reference)
        for number in range(first, last - 1)
        for reference in {number + 1, *(chance.randrange(number + 1, last) for _ in range(_REFERENCES))}
    ]
    with builder.connect() as connection:
        connection.executemany(
            "insert into ValidPaths (id, path, hash, registrationTime, narSize) values (?, ?, ?, 0, 100000)",
            [(*row, f"sha256:{'0' * 64}") for row in rows],
        )
        connection.executemany("insert into Refs values (?, ?)", references)
        connection.executemany(
            "insert into Refs select id, ? from ValidPaths where path = ?", [(first, root) for root in roots]
        )


def _hammer(arena: Arena, builder: StoreBuilder, what: str, requests: Sequence[Request]) -> None:
    add_small(builder)
    root = Path(builder.real_dir).parents[1]
    with (
        arena.attacked(f"{_CONNECTIONS} connections ask for {what}", _SETTINGS, root=root) as (server, outcome),
        going_on(hammer, server.url, requests, _CONNECTIONS) as outcome.counts,
    ):
        arena.wait()


ALL = [texts, closures]

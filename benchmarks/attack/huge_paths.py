"""Attacks on paths with very many files, because each request walks all files."""

import random
from collections.abc import Sequence

from benchmarks.attack.arena import Arena
from benchmarks.attack.client import Request, going_on, hammer, read_slowly
from support.running import nar_url

_RANGES = 40
_PAGES = 16


def small_ranges(arena: Arena) -> None:
    info = arena.store.ranged
    chance = random.Random(1)
    starts = [chance.randrange(info.nar_size) for _ in range(1000)]
    requests: list[Request] = [(nar_url(info), {"Range": f"bytes={start}-{start}"}) for start in starts]
    _hammer(arena, f"Range: bytes=N-N of a NAR of {arena.form.ranged:,} files", requests, _RANGES)


def slow_readers(arena: Arena) -> None:
    url = nar_url(arena.store.read)
    name = f"{arena.form.readers} slow readers of a cold NAR of {arena.form.read:,} files"
    with (
        arena.attacked(name) as (server, outcome),
        going_on(read_slowly, server.url, url, arena.form.readers) as outcome.counts,
    ):
        arena.wait()


def pages(arena: Arena) -> None:
    requests: list[Request] = [(f"/serve/{arena.store.paged.path.hash_part}/", {})]
    _hammer(arena, f"the page of a directory of {arena.form.paged:,} entries", requests, _PAGES)


def landing(arena: Arena) -> None:
    _hammer(arena, "the page at /", [("/", {})], _PAGES)


def listing_ranges(arena: Arena) -> None:
    url = f"/{arena.store.paged.path.hash_part}.ls"
    requests: list[Request] = [(url, {"Range": f"bytes={start}-{start + 9}"}) for start in range(0, 100_000, 999)]
    _hammer(arena, f"ranges of the listing of {arena.form.paged:,} entries", requests, _PAGES)


def listings(arena: Arena) -> None:
    requests: list[Request] = [(f"/{arena.store.read.path.hash_part}.ls", {"Accept-Encoding": "zstd"})]
    _hammer(arena, f"the listing of {arena.form.read:,} entries", requests, _PAGES)


def _hammer(arena: Arena, what: str, requests: Sequence[Request], connections: int) -> None:
    with (
        arena.attacked(f"{connections} connections ask for {what}") as (server, outcome),
        going_on(hammer, server.url, requests, connections) as outcome.counts,
    ):
        arena.wait()


ALL = [small_ranges, slow_readers, pages, landing, listing_ranges, listings]

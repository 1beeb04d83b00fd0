"""The table of all resources with their requests, and a store that answers them."""

from pathlib import Path
from typing import NamedTuple

from harmonia.cache.zstd import Encoding
from harmonia.config.tables.zstd import Zstd
from harmonia.nix import base32
from harmonia.tools.store_builder import StoreBuilder
from support.build_logs import TEXT, add_log, collected
from support.realisations import BUILD_TRACE, HASH, REALISATIONS, create, register, trace
from support.shared_store import BIG

_NONE = "0" * 32


_BUILD_ID = "1234567890abcdef1234567890abcdef12345678"


class Row(NamedTuple):
    path: str
    negotiable: bool = False
    """True if the resource is also available in zstd."""
    ranges: bool = False
    named: bool = True
    """True if the URL names exact bytes. Otherwise ranges get 404, because they could belong to other bytes."""
    etag: bool = True
    status: int = 200
    live: bool = False
    """True if each response differs."""
    has_page: bool = False
    """True if browsers get a page instead."""
    endless: bool = False
    """True if the response to GET does not end."""


ROWS: dict[str, list[Row]] = {
    "/": [Row("/", negotiable=True)],
    "/nix-cache-info": [Row("/nix-cache-info", etag=False)],
    "narinfo": [
        Row("/{hash}.narinfo"),
        Row("/{hash}.narinfo?json"),
        Row(f"/{_NONE}.narinfo", status=404),
        Row(f"/{_NONE}.narinfo?json", status=404),
    ],
    "ls": [Row("/{hash}.ls", negotiable=True, ranges=True), Row(f"/{_NONE}.ls", status=404)],
    "closure": [Row("/{hash}.closure", negotiable=True, ranges=True), Row(f"/{_NONE}.closure", status=404)],
    "/nar/<name:str>": [
        Row("/nar/{hash}-{narhash}.nar", negotiable=True, ranges=True),
        Row("/nar/{hash}-{narhash}-{encoding}.nar.zst", ranges=True),
        Row("/nar/{hash}-{narhash}.nar.zst", named=False),
        Row("/nar/{hash}-{narhash}-zstd-1.4.4-3-0.nar.zst", named=False),
        Row("/nar/{narhash}.nar?hash={hash}", negotiable=True, ranges=True),
        Row("/nar/{hash}.nar", negotiable=True, ranges=True),
        Row(f"/nar/{_NONE}.nar", status=404),
        Row("/nar/..%2f..%2fetc%2fpasswd", status=404),
    ],
    "/upstream/<name:path>": [Row("/upstream/{hash}-{narhash}-{narhash}.nar.xz", status=404)],
    "/log/<name:str>": [
        Row("/log/{plain}", negotiable=True, ranges=True),
        Row("/log/{packed}", negotiable=True, ranges=True),
        Row(f"/log/{_NONE}-none.drv", status=404),
        Row("/log/none", status=404),
    ],
    "/realisations/<name:str>": [
        Row(f"/realisations/{HASH}!out.doi"),
        Row(f"/realisations/{HASH}!doc.doi", status=404),
        Row("/realisations/none", status=404),
    ],
    "/build-trace-v2/<derivation:str>/<name:str>": [
        Row("/build-trace-v2/{plain}/out.doi"),
        Row("/build-trace-v2/{packed}/out.doi", status=404),
        Row("/build-trace-v2/none/none", status=404),
    ],
    "/debuginfo/<name:str>": [
        Row(f"/debuginfo/{_BUILD_ID}"),
        Row(f"/debuginfo/{_BUILD_ID}.debug"),
        Row(f"/debuginfo/{'0' * 40}", status=404),
    ],
    "/serve/<where:path>": [
        Row("/serve/{hash}/", negotiable=True),
        Row("/serve/{hash}", etag=False, status=301),
        Row("/serve/{hash}/big", negotiable=True, ranges=True),
        Row("/serve/{hash}/empty", negotiable=True, ranges=True),
        Row("/serve/{hash}/empty?view", negotiable=True),
        Row("/serve/{hash}/../{hash}/big", status=404),
        Row("/serve/{hash}/none", status=404),
        Row(f"/serve/{_NONE}/", status=404),
    ],
    "/search": [Row("/search?q=tree", negotiable=True), Row("/search", negotiable=True)],
    "path": [Row("/path/{hash}", negotiable=True), Row(f"/path/{_NONE}", status=404)],
    "diff": [
        Row("/diff/{hash}/{hash}", negotiable=True),
        Row("/diff/{hash}/{hash}?json", negotiable=True),
        Row(f"/diff/{{hash}}/{_NONE}", status=404),
    ],
    "sbom": [Row("/sbom/{hash}", negotiable=True), Row(f"/sbom/{_NONE}", status=404)],
    "explain": [Row(f"/explain/{_NONE}", etag=False, has_page=True), Row(f"/explain/{_NONE}?json", etag=False)],
    "/events": [Row("/events?event=none", status=400), Row("/events", endless=True)],
    "/robots.txt": [Row("/robots.txt")],
    "/favicon.ico": [Row("/favicon.ico")],
    "/version": [Row("/version", etag=False)],
    "/health": [Row("/health", etag=False), Row("/health?verbose", etag=False)],
    "/metrics": [Row("/metrics", etag=False, live=True)],
}
ABOUT_PATHS = [row for rows in ROWS.values() for row in rows if row.status != 404 and "{" in row.path]
ABOUT_PATHS += [
    row for rows in ROWS.values() for row in rows if row.path.startswith(("/realisations/sha", "/debuginfo/1"))
]
"""Requests for resources of a store path."""


def filled(row: Row, hashes: dict[str, str]) -> str:
    """Return the path of a request, with names from the store of `stock`."""
    return row.path.format(**hashes)


def stock(root: Path) -> dict[str, str]:
    """Build a store that has a resource for each row of the table. Return the values for its placeholders."""
    store = StoreBuilder(root)
    debug = {".build-id": {_BUILD_ID[:2]: {f"{_BUILD_ID[2:]}.debug": b"\x7fELF"}}}
    info = store.add(store.output_path("tree"), {"big": BIG[:200_000], "empty": b"", "lib": {"debug": debug}})
    plain, packed = collected(store, "plain"), collected(store, "packed")
    add_log(store, plain, suffix="")
    add_log(store, packed, TEXT[: 1 << 16], ".bz2")
    create(store, REALISATIONS + BUILD_TRACE)
    register(store, HASH, "out", info.path)
    trace(store, plain, "out", info.path)
    return {
        "hash": info.path.hash_part,
        "narhash": base32.encode(info.nar_hash),
        "encoding": Encoding.of(Zstd()).name,
        "plain": plain,
        "packed": packed,
    }

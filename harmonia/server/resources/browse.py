"""`/search` and `/path/<hash>`: search for store paths by name or hash, and the page of one path, for people.

Only if `browse` is set. All other resources need a hash part, which nobody can guess: so a private path in a public
cache stays private. A search shows all paths, and the referrers of a path show others.
"""

import math
import re
from collections.abc import Container, Iterable
from contextlib import closing, suppress
from http import HTTPStatus
from itertools import groupby
from typing import NamedTuple
from urllib.parse import quote, urlencode

from html5tagger import Builder
from sanic import Request
from sanic.exceptions import NotFound

from harmonia.nix import base32
from harmonia.nix.package_name import PackageName
from harmonia.nix.path_info import PathInfo
from harmonia.nix.store_path import HASH_PART_LENGTH, StorePath
from harmonia.server import page
from harmonia.server.context import ServerContext
from harmonia.server.http import origin
from harmonia.server.http.response import Representation
from harmonia.server.path_lookup import SignedPath
from harmonia.server.resources import landing
from harmonia.store import build_log, closure_tree, queries
from harmonia.store.closure_tree import Node, Summary
from harmonia.store.queries import ListedPath
from harmonia.store.store import Store
from harmonia.untrusted import integer

_PAGE_PATHS = 100
_MAX_PAGE = 999_999
_MAX_SHOWN = 200  # references and referrers on one page
_MAX_NEWEST = 50
_SUMMARY_BYTES = 100_000  # at most: the nodes of three levels with six children each
_MAX_QUERY_CHARS = 300  # more than a store path has
_HASH_PART = re.compile(f"[{base32.ALPHABET}]{{{HASH_PART_LENGTH}}}(?![0-9a-z])")


async def search(context: ServerContext, request: Request) -> Representation:
    if not context.settings.browse:
        raise NotFound
    asked = " ".join(request.args.get("q", "")[:_MAX_QUERY_CHARS].split())
    hash_part = _HASH_PART.match(asked.removeprefix(context.store.store_dir + "/"))
    if hash_part and await context.paths.lookup_usable_path(hash_part[0]):
        return page.redirect(f"path/{hash_part[0]}", HTTPStatus.SEE_OTHER, "no-cache")
    if not asked:
        return await _newest(context, request)
    number = integer(request.args.get("page", ""), _MAX_PAGE) or 1
    before = await _compared(context, request.args.get("compare", ""))
    result = await context.threads.run_slow_db(
        lambda store: queries.search(
            store, asked, _PAGE_PATHS, context.paths.publish_filter(store), start=(number - 1) * _PAGE_PATHS
        )
    )
    document = page.begin(context, request, asked, "./", asked)
    with document.main:
        document.h1("Compare" if before else "Search")
        if before:
            document.p("Choose a path to compare the closure of ").a(before.name, href=f"path/{before.hash_part}")
            document._(" with.")
        document.p(_summary(asked, result), class_="dim", role="status")
        if hash_part:
            with document.nav(class_="actions", aria_label="Reasons"):
                document.a("Why?", href=f"explain/{hash_part[0]}")
        if result.shown:
            with document.section, document.table(class_="paths"):
                _head(document)
                for _, group in groupby(result.shown, key=lambda listed: listed.package):
                    document.tbody()
                    for listed in group:
                        _row(document, listed, before)
        more = {"q": asked, **({"compare": before.hash_part} if before else {})}
        _pages(document, more, number, math.ceil(result.total / _PAGE_PATHS))
    return page.end(context, document)


async def _compared(context: ServerContext, hash_part: str) -> StorePath | None:
    """Return the path whose closure is to be compared, or None without a valid one."""
    if not _HASH_PART.fullmatch(hash_part):
        return None
    signed = await context.paths.lookup_usable_path(hash_part)
    return signed.info.path if signed else None


def _head(document: Builder) -> None:
    document.thead.tr.th("Name", scope="col").th("Size", scope="col", class_="size")
    document.th("Valid since", scope="col", class_="size date")


def _row(document: Builder, listed: ListedPath, before: StorePath | None = None) -> None:
    """Add a path to a table. It links to its page, or to its comparison with `before`."""
    path = listed.path
    document.tr(data_hash=path.hash_part).td(class_="path")
    if path == before:
        document(path.name)
    else:
        document.a(path.name, href=f"diff/{before.hash_part}/{path.hash_part}" if before else f"path/{path.hash_part}")
    document._(" ").span(path.hash_part, class_="hash")
    document.td(page.size(listed.nar_size), class_="size")
    document.td(page.moment(listed.registered), class_="size date")


def _pages(document: Builder, query: dict[str, str], number: int, last: int) -> None:
    """Add links to the other pages of a search."""
    if last <= 1:
        return
    with document.nav(class_="actions", aria_label="Pages"):
        document.span(f"Page {number:,} of {last:,}", class_="dim")
        for text, rel, other in (("Previous", "prev", number - 1), ("Next", "next", number + 1)):
            if 1 <= other <= last:
                document.a(text, href=f"search?{urlencode({**query, 'page': other})}", rel=rel)


async def _newest(context: ServerContext, request: Request) -> Representation:
    """Return the page of the newest paths. `newest.js` keeps it up to date."""
    newest = await context.threads.run_slow_db(
        lambda store: queries.newest(store, _MAX_NEWEST, context.paths.publish_filter(store))
    )
    document = page.begin(context, request, "Search", "./")
    with document.main:
        document.h1("Newest paths")
        document.p("To search, enter a part of a path's name, or the beginning of its hash.", class_="dim")
        with document.section, document.table(id="newest", class_="paths", data_most=str(_MAX_NEWEST)):
            _head(document)
            document.tbody()
            for listed in newest:
                _row(document, listed)
        document.p(id="live", class_="dim", role="status")
    return page.end(context, document, script="newest")


def _summary(asked: str, result: queries.Found) -> str:
    least = "" if result.complete else "At least "
    return f"{least}{page.count(result.total, 'path')} for “{asked}”"


class _AboutPath(NamedTuple):
    """Facts of a path from slow queries."""

    registered: int
    """In seconds since 1970; 0 if the path was deleted meanwhile."""
    referrers: queries.Paths


async def path(context: ServerContext, request: Request, hash_part: str) -> Representation:
    if not context.settings.browse:
        raise NotFound
    signed = await context.paths.lookup_path(hash_part)
    if signed is None:
        raise NotFound
    info = signed.info

    def about(store: Store) -> _AboutPath:
        registered = next((listed.registered for listed in queries.list_paths(store, [info.path])), 0)
        published = context.paths.publish_filter(store)
        return _AboutPath(registered, queries.referrers(store, info.path, _MAX_SHOWN, published))

    registered, referrers = await context.threads.run_slow_db(about)
    # With a publish policy, the closure may contain paths that are not published.
    summary = None if context.paths.policy else await _closure(context, request, info.path, registered)
    deriver_is_here = (
        info.deriver is not None and await context.paths.lookup_usable_path(info.deriver.hash_part) is not None
    )
    full_path = f"{context.store.store_dir}/{info.path}"
    command = landing.command(
        f"nix-store --realise {full_path}", origin.base_url(request, context.settings), context.trusted_keys
    )
    references = sorted(set(info.references) - {info.path}, key=queries.by_name)
    unpublished = {path for path in references[:_MAX_SHOWN] if not await context.paths.is_published(path)}

    document = page.begin(context, request, info.path.name, "../")
    with document.main:
        document.h1(info.path.name)
        page.snippet(document, "Store path", full_path, line=True)
        page.snippet(document, "NAR hash", f"sha256:{base32.encode(info.nar_hash)}", line=True)
        page.snippet(document, "Download it with Nix", command)
        _links(context, document, info, await _logged(context, info))
        with document.section:
            document.h2("About this path")
            _facts(document, signed, registered, summary, deriver_is_here=deriver_is_here)
        if summary and summary.tree:
            with document.section:
                document.h2("What makes the closure large")
                document.p("The size of each path includes the paths that only it needs.", class_="dim")
                _tree(document, summary.tree, summary.closure.size)
        _paths(document, "References", "needs", queries.Paths(references[:_MAX_SHOWN], len(references)), unpublished)
        _paths(document, "Referrers", "is needed by", referrers)
    return page.end(context, document, script="copy")


async def _closure(context: ServerContext, request: Request, path: StorePath, registered: int) -> Summary:
    """Return the summary of a closure, made once: the closure stays the same as long as the path is valid."""

    def make() -> Summary:
        store = Store.of(context.settings)
        with closing(store.database):
            return closure_tree.summarize(store, path)

    key = ("closure", path, registered)
    return await context.made.value(key, context.client(request), make, lambda _: _SUMMARY_BYTES)


def _tree(document: Builder, nodes: Iterable[Node], whole: int) -> None:
    with document.ul(class_="tree"):
        for node in nodes:
            document.li()
            with document.div:
                document.meter(value=node.size, max=whole, aria_label=f"Part of {node.path.name} in the closure")
                document.span(page.size(node.size), class_="size")
                document.a(node.path.name, href=node.path.hash_part, class_="path")
            if node.children:
                _tree(document, node.children, whole)


async def _logged(context: ServerContext, info: PathInfo) -> StorePath | None:
    """Return the derivation that built the path, if its log exists and may be served."""
    derivation = info.path if info.path.is_derivation else info.deriver
    if derivation is not None:
        with suppress(OSError):
            log = await context.threads.run_io(lambda: build_log.find_log(context.settings.logs, derivation))
            if log is not None and await context.paths.is_log_published(derivation):
                return derivation
    return None


def _links(context: ServerContext, document: Builder, info: PathInfo, logged: StorePath | None) -> None:
    with document.nav(class_="actions", aria_label="Files of this path"):
        if context.settings.serve_files:
            document.a("Files", href=f"../serve/{info.path.hash_part}")
        document.a("NAR", href=f"../nar/{info.path.hash_part}-{base32.encode(info.nar_hash)}.nar")
        document.a("NAR listing", href=f"../{info.path.hash_part}.ls")
        package = PackageName.parse(info.path.name.removesuffix(".drv")).name
        other = urlencode({"q": package, "compare": info.path.hash_part})
        document.a("Compare", href=f"../search?{other}", title="Compare with another version")
        document.a("Why", href=f"../explain/{info.path.hash_part}", title="Why clients can use this path, or cannot")
        document.a("SBOM", href=f"../sbom/{info.path.hash_part}")
        document.a("narinfo", href=f"../{info.path.hash_part}.narinfo")
        if logged:
            document.a("Build log", href=f"../log/{quote(logged)}")


def _facts(
    document: Builder, signed: SignedPath, registered: int, summary: Summary | None, *, deriver_is_here: bool
) -> None:
    info = signed.info
    with document.dl:
        document.dt("Size").dd(page.size(info.nar_size))
        if summary is not None:
            least = "" if summary.closure.complete else "at least "
            paths = page.count(summary.closure.paths, "path")
            document.dt("Closure").dd(f"{least}{page.size(summary.closure.size)}, {paths}")
        document.dt("Valid since").dd(page.moment(registered))
        if info.deriver:
            document.dt("Deriver")
            if deriver_is_here:
                document.dd.a(info.deriver, href=info.deriver.hash_part, class_="path")
            else:
                document.dd.code(info.deriver)._(" (not in this cache)")
        if info.ca:
            document.dt("Content address").dd.code(info.ca)
        document.dt("Signatures")
        for sig in signed.sigs:
            document.dd.code(sig)
        if not signed.sigs:
            document.dd("none")


def _paths(
    document: Builder, heading: str, verb: str, paths: queries.Paths, unpublished: Container[StorePath] = ()
) -> None:
    with document.section:
        document.h2(heading)
        shown = f"; the first {len(paths.shown):,} are shown" if paths.total > len(paths.shown) else ""
        document.p(
            f"This path {verb} {page.count(paths.total, 'path') if paths.total else 'no path'}{shown}.", class_="dim"
        )
        page.paths(document, paths.shown, "./", unpublished)

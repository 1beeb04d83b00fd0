"""`/search` and `/path/<hash>`: search for store paths by name or hash, and the page of one path, for people.

Only if `browse` is set. All other resources need a hash part, which nobody can guess: so a private path in a public
cache stays private. A search shows all paths, and the referrers of a path show others.
"""

import re
import time
from collections.abc import Container
from contextlib import suppress
from http import HTTPStatus
from urllib.parse import quote

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
from harmonia.store import build_log, queries

_MAX_SHOWN = 200  # paths on one page
_MAX_NEWEST = 50
_MAX_VERSIONS = 10  # to compare with
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
        return await _newest(context)
    result = await context.threads.run_slow_db(
        lambda store: queries.search(store, asked, _MAX_SHOWN, context.paths.publish_filter(store))
    )
    document = page.begin(context, f"{asked} in a Nix binary cache", "./", asked)
    with document.main:
        document.h1("Search")
        with document.section:
            document.p(_summary(asked, result), class_="dim", role="status")
            page.paths(document, result.shown, "path/")
    return page.end(context, document)


async def _newest(context: ServerContext) -> Representation:
    """Return the page of the newest paths. `newest.js` keeps it up to date."""
    newest = await context.threads.run_slow_db(
        lambda store: queries.newest(store, _MAX_NEWEST, context.paths.publish_filter(store))
    )
    document = page.begin(context, "Search a Nix binary cache", "./")
    with document.main:
        document.h1("Newest paths")
        document.p("Enter a part of a path's name, or the beginning of its hash, to search.", class_="dim")
        with document.section, document.table(id="newest", data_most=str(_MAX_NEWEST)):
            document.thead.tr.th("Name", scope="col").th("Size", scope="col", class_="size")
            document.th("Valid since", scope="col", class_="size")
            document.tbody()
            for path, size, registered in newest:
                document.tr(data_hash=path.hash_part).td(class_="path").a(path.name, href=f"path/{path.hash_part}")
                document._(" ").span(path.hash_part, class_="dim")
                document.td(page.size(size), class_="size")
                document.td(time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(registered)), class_="size")
        document.p(id="live", class_="dim", role="status")
    return page.end(context, document, script="newest")


def _summary(asked: str, result: queries.Paths) -> str:
    least = "" if result.complete else "at least "
    first = f"The first {len(result.shown)} of " if result.total > len(result.shown) else ""
    return f"{first}{least if first else least.capitalize()}{page.count(result.total, 'path')} for “{asked}”"


async def path(context: ServerContext, request: Request, hash_part: str) -> Representation:
    if not context.settings.browse:
        raise NotFound
    signed = await context.paths.lookup_path(hash_part)
    if signed is None:
        raise NotFound
    info = signed.info
    referrers = await context.threads.run_slow_db(
        lambda store: queries.referrers(store, info.path, _MAX_SHOWN, context.paths.publish_filter(store))
    )
    # With a publish policy, the closure may contain paths that are not published.
    closure = (
        None
        if context.paths.policy
        else await context.threads.run_slow_db(lambda store: queries.closure_size(store, info.path))
    )
    package = PackageName.parse(info.path.name).name
    similar = await context.threads.run_slow_db(
        lambda store: queries.search(store, package, _MAX_SHOWN, context.paths.publish_filter(store))
    )
    versions = [
        path
        for path in similar.shown
        if path != info.path and not path.is_derivation and PackageName.parse(path.name).name == package
    ][:_MAX_VERSIONS]
    deriver_is_here = (
        info.deriver is not None and await context.paths.lookup_usable_path(info.deriver.hash_part) is not None
    )
    full_path = f"{context.store.store_dir}/{info.path}"
    keys = context.trusted_keys
    references = sorted(info.references, key=queries.by_name)
    unpublished = {path for path in references[:_MAX_SHOWN] if not await context.paths.is_published(path)}

    document = page.begin(context, info.path.name, "../")
    with document.main:
        document.h1(info.path.name)
        page.snippet(document, full_path, "Store path")
        _links(context, document, info, await _logged(context, info))
        with document.section:
            document.h2("About this path")
            _facts(document, signed, closure, deriver_is_here=deriver_is_here)
        with document.section:
            document.h2("Download it with Nix")
            command = f"nix-store --realise {full_path}"
            page.snippet(
                document, landing.command(command, origin.base_url(request, context.settings), keys), "Command"
            )
        if versions:
            with document.section:
                document.h2("Compare with")
                page.paths(document, versions, f"../diff/{info.path.hash_part}/")
        _paths(document, "References", queries.Paths(references[:_MAX_SHOWN], len(references)), unpublished)
        _paths(document, "Referrers", referrers)
    return page.end(context, document, script="copy")


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
        document.a("SBOM", href=f"../sbom/{info.path.hash_part}")
        document.a("narinfo", href=f"../{info.path.hash_part}.narinfo")
        if logged:
            document.a("Build log", href=f"../log/{quote(logged)}")


def _facts(document: Builder, signed: SignedPath, closure: queries.Closure | None, *, deriver_is_here: bool) -> None:
    info = signed.info
    with document.dl:
        document.dt("Size").dd(page.size(info.nar_size))
        if closure is not None:
            least = "" if closure.complete else "at least "
            document.dt("Closure").dd(f"{least}{page.size(closure.size)}, {page.count(closure.paths, 'path')}")
        document.dt("NAR hash").dd.code(f"sha256:{base32.encode(info.nar_hash)}")
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


def _paths(document: Builder, heading: str, paths: queries.Paths, unpublished: Container[StorePath] = ()) -> None:
    with document.section:
        document.h2(heading)
        if not paths.total:
            document.p("None", class_="dim")
        elif paths.total > len(paths.shown):
            document.p(f"{len(paths.shown)} of {paths.total:,}", class_="dim")
        page.paths(document, paths.shown, "./", unpublished)

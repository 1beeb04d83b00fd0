"""`/diff/<hash>/<hash>`: what changed between two closures, for people; with `?json`, for programs.

Only if `browse` is set. The packages are compared as by `nix store diff-closures`, from the database alone.
"""

import json

from html5tagger import Builder
from sanic import Request
from sanic.exceptions import NotFound

from harmonia.server import page
from harmonia.server.context import ServerContext
from harmonia.server.http.response import Representation
from harmonia.server.resources.nar import require_info
from harmonia.store import packages
from harmonia.store.packages import Change
from harmonia.store.store import Store

_MAX_SHOWN = 2000  # packages on the page


async def get(context: ServerContext, request: Request, before: str, after: str) -> Representation:
    if not context.settings.browse:
        raise NotFound
    old, new = [require_info(await context.paths.lookup_path(hash_part)) for hash_part in (before, after)]

    def compare(store: Store) -> list[Change]:
        published = context.paths.publish_filter(store)
        return packages.changes(*(packages.members(store, info.path, published) for info in (old, new)))

    changes = await context.threads.run_slow_db(compare)
    if "json" in request.get_args(keep_blank_values=True):
        value = {"before": old.path, "after": new.path, "changes": [change._asdict() for change in changes]}
        text = json.dumps(value).encode() + b"\n"
        return page.of_text(context, "application/json", text)
    document = page.begin(context, request, f"{old.path.name} → {new.path.name}", "../../")
    with document.main:
        document.h1("Difference between two closures")
        with document.section, document.dl:
            for term, info in (("Before", old), ("After", new)):
                document.dt(term).dd.a(info.path, href=f"../../path/{info.path.hash_part}", class_="path")
            document.dt("Size").dd(_signed_size(sum(change.size for change in changes)))
            document.dt("Packages").dd(_counts(changes))
        if changes:
            _table(document, changes)
    return page.end(context, document)


def _counts(changes: list[Change]) -> str:
    added = sum(not change.before for change in changes)
    removed = sum(not change.after for change in changes)
    return f"{added:,} added, {removed:,} removed, {len(changes) - added - removed:,} changed"


def _table(document: Builder, changes: list[Change]) -> None:
    with document.section:
        if len(changes) > _MAX_SHOWN:
            document.p(f"The first {_MAX_SHOWN:,} of {len(changes):,}", class_="dim")
        with document.table:
            document.tr.th("Package", scope="col").th("Before", scope="col").th("After", scope="col")
            document.th("Size", scope="col", class_="size")
            for change in changes[:_MAX_SHOWN]:
                document.tr.td(change.name).td(_versions(change.before)).td(_versions(change.after))
                document.td(_signed_size(change.size), class_="size")


def _versions(versions: tuple[str, ...]) -> str:
    return ", ".join(version or "without a version" for version in versions) or "—"


def _signed_size(size: int) -> str:
    """Return a difference of bytes with its sign, such as "+1.5 MiB"."""
    return f"{'+' if size > 0 else '-' if size < 0 else ''}{page.size(abs(size))}"

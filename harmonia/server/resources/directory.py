"""Page of a directory in a store path: its entries, and links to each entry and to the parent directories."""

import os
import stat
from collections.abc import Sequence
from typing import cast
from urllib.parse import quote

from html5tagger import Builder
from sanic import Request

from harmonia.nix.path_info import PathInfo
from harmonia.server import page
from harmonia.server.context import ServerContext
from harmonia.server.http.auth import check_rate
from harmonia.server.http.response import Representation
from harmonia.store.object_files import DirectoryEntry, Entry, list_directory

_MAX_ENTRIES = 2000  # entries on the page; the NAR listing has all


async def representation(
    context: ServerContext, request: Request, asked: PathInfo, names: Sequence[bytes], entry: Entry
) -> Representation:
    """Return the page of the directory `entry`, whose URL has the store path `asked` and then `names`.

    Raises 429 if the client exceeds `max_query_rate`.
    """

    def render() -> Representation:
        entries, count = list_directory(context.store.real_path(entry.info.path), entry.names, _MAX_ENTRIES)
        document = page.begin(
            context, page.printable(names[-1]) if names else asked.path.name, "../" * (len(names) + 2)
        )
        with document.main:
            _heading(context, document, asked, names)
            with document.section:
                summary = page.count(count, "entry", "entries")
                if count > len(entries):
                    summary = f"The first {len(entries):,} of {summary}; the NAR listing has all"
                document.p(summary, class_="dim")
                with document.table:
                    document.tr.th("Name", scope="col").th("Kind", scope="col", class_="kind")
                    document.th("Size", scope="col", class_="size")
                    if names:
                        document.tr.td.a("..", href="../", aria_label="Parent directory").td(
                            "directory", class_="kind"
                        ).td("")
                    for each in entries:
                        _row(document, each)
        return page.end(context, document)

    check_rate(context, request)
    # The page depends only on the values in its key. The times in `place` change with the directory.
    status = entry.status
    place = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
    key = ("page", asked.path, tuple(names), entry.info.path, tuple(entry.names), place)
    return await context.made.value(key, context.client(request), render, lambda made: len(cast("bytes", made.body)))


def _heading(context: ServerContext, document: Builder, asked: PathInfo, names: Sequence[bytes]) -> None:
    """Add the path of the directory, with links to its parents, and links to other pages of the store path."""
    top = "../" * (len(names) + 2)
    with document.h1(class_="path"):
        document(context.store.store_dir)
        for above, name in zip(range(len(names), -1, -1), [os.fsencode(asked.path), *names], strict=True):
            document._("/")
            if above:
                document.a(page.printable(name), href="../" * above)
            else:
                document._(page.printable(name))
    with document.nav(class_="actions", aria_label="Other pages of the store path"):
        if context.settings.browse:
            document.a("About this path", href=f"{top}path/{asked.path.hash_part}")
        document.a("NAR listing", href=f"{top}{asked.path.hash_part}.ls")


def _row(document: Builder, entry: DirectoryEntry) -> None:
    reference = "./" + quote(entry.name, safe="")
    size = after = ""
    if stat.S_ISDIR(entry.mode):
        kind, reference, after = "directory", reference + "/", "/"
    elif stat.S_ISLNK(entry.mode):
        kind, after = "symlink", f" → {page.printable(entry.target)}"
    else:
        kind, size = "executable" if entry.mode & stat.S_IXUSR else "file", page.size(entry.size)
    document.tr.td(class_="path").a(page.printable(entry.name), href=reference)
    document.span(after, class_="dim")
    document.td(kind, class_="kind").td(size, class_="size", title=f"{entry.size:,} bytes" if size else None)

"""Page of a directory in a store path: its entries, and links to each entry and to the parent directories."""

import os
import stat
from collections.abc import Callable, Sequence
from typing import cast
from urllib.parse import quote

from html5tagger import Builder
from sanic import Request

from harmonia.nix.path_info import PathInfo
from harmonia.server import page
from harmonia.server.context import ServerContext
from harmonia.server.http import content_type
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
        title = page.printable(names[-1]) if names else asked.path.name
        top = "../" * (len(names) + 2)
        document = page.begin(context, request, title, top)
        with document.main:
            heading(context, document, asked, names, len(names) + 1)
            with document.nav(class_="actions", aria_label="Other pages of the store path"):
                links(context, request, document, asked, top)
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
    return await made_once(context, request, asked, names, entry, render)


async def made_once(
    context: ServerContext,
    request: Request,
    asked: PathInfo,
    names: Sequence[bytes],
    entry: Entry,
    render: Callable[[], Representation],
) -> Representation:
    """Return the page of a file or directory, made by `render` in a thread, or as it was made before.

    A page depends only on its URL, on the entry, and on its header.
    """
    status = entry.status
    place = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)  # the times change with the content
    url = (asked.path, tuple(names))
    key = ("page", *url, entry.info.path, tuple(entry.names), place, page.header_key(context, request))
    return await context.made.value(key, context.client(request), render, lambda made: len(cast("bytes", made.body)))


def heading(context: ServerContext, document: Builder, asked: PathInfo, names: Sequence[bytes], depth: int) -> None:
    """Add the path of a file or directory as a heading, with links to the directories above.

    `depth` is the number of slashes in the page's URL after `/serve/`: a directory has one more than a file.
    """
    with document.h1(class_="path"):
        document(context.store.store_dir)
        for level, name in enumerate([os.fsencode(asked.path), *names]):
            document._("/")
            if level < len(names):
                document.a(page.printable(name), href="../" * (depth - level - 1) or "./")
            else:
                document._(page.printable(name))


def links(context: ServerContext, request: Request, document: Builder, asked: PathInfo, top: str) -> None:
    """Add links to the other pages of a store path."""
    if context.may_browse(request):
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
        if content_type.is_source(content_type.of(entry.name, b"")):
            reference += "?view"
    document.tr.td(class_="path").a(page.printable(entry.name), href=reference)
    document.span(after, class_="dim")
    document.td(kind, class_="kind").td(size, class_="size", title=f"{entry.size:,} bytes" if size else None)

"""`/serve/<hash>/<path>?view`: the text of a file as a page with line numbers.

The text is only ever text of the page: markup in it is escaped. Without `?view`, the same URL has the file's bytes.
"""

import os
import re
from collections.abc import Sequence
from http import HTTPStatus
from urllib.parse import quote

from html5tagger import E
from sanic import Request

from harmonia.nix.path_info import PathInfo
from harmonia.server import page
from harmonia.server.context import ServerContext
from harmonia.server.http import content_type
from harmonia.server.http.auth import check_rate
from harmonia.server.http.response import Representation
from harmonia.server.resources import directory
from harmonia.store.object_files import Entry, File

_MAX_BYTES = 256 * 1024
_MAX_LINES = 10_000

# Control characters, and those that change the direction of text: both can hide what a file really contains.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


async def representation(
    context: ServerContext, request: Request, asked: PathInfo, names: Sequence[bytes], entry: Entry
) -> Representation:
    """Return the page of the file `entry`, whose URL has the store path `asked` and then `names`.

    Redirects to the file itself if it is not a text. Raises 429 if the client exceeds `max_query_rate`.
    """
    name = names[-1] if names else os.fsencode(asked.path)
    raw = "./" + quote(names[-1] if names else asked.path.hash_part, safe="")
    kind = content_type.of(entry.names[-1] if entry.names else os.fsencode(entry.info.path), entry.sample)
    if not (content_type.is_source(kind) and content_type.is_text(entry.sample)):
        return page.redirect(raw, HTTPStatus.SEE_OTHER, "no-cache")
    check_rate(context, request)

    def render() -> Representation:
        file = File(context.store.real_path(entry.info.path), entry.names, entry.status)
        head = b"".join(part.read(_MAX_BYTES) for part in file.read(0, min(file.size, _MAX_BYTES)))
        lines = head.decode(errors="replace").replace("\r\n", "\n").removesuffix("\n").split("\n")
        is_cut = file.size > len(head) or len(lines) > _MAX_LINES
        lines = lines[:_MAX_LINES]
        top = "../" * (len(names) + 1)
        document = page.begin(context, request, page.printable(name), top)
        with document.main:
            directory.heading(context, document, asked, names, len(names))
            with document.nav(class_="actions", aria_label="Other forms of this file"):
                document.a("Raw", href=raw)
                directory.links(context, request, document, asked, top)
            size = page.size(file.size)
            count = page.count(len(lines), "line")
            document.p(f"{size}; only the first {count} are shown" if is_cut else f"{size}, {count}", class_="dim")
            with document.section(class_="source"):
                with document.pre(class_="numbers", aria_hidden="true"):
                    for number in range(1, len(lines) + 1):
                        document.span(f"{number}\n", id=f"L{number}")
                text = _HIDDEN.sub(lambda match: ascii(match[0])[1:-1], "\n".join(lines))
                document.pre(E.code(text), tabindex="0", role="region", aria_label=page.printable(name))
        return page.end(context, document)

    return await directory.made_once(context, request, asked, names, entry, render)

"""NAR listings, `.ls` files: entries of an archive and offsets of their contents (Nix `src/libutil/nar-listing.cc`).

A listing is JSON, except that names and symlink targets are raw bytes, which need not be UTF-8.
"""

import re
import stat
from collections.abc import Iterable, Iterator

from harmonia.nix.nar import Entry

_ESCAPED = re.compile(rb'[\x00-\x1f"\\]')


def _string(text: bytes) -> bytes:
    if _ESCAPED.search(text):
        text = _ESCAPED.sub(lambda match: b"\\u%04x" % match[0][0], text)
    return b'"%b"' % text


def render(located: Iterable[tuple[int, Entry]]) -> Iterator[bytes]:
    """Yield the listing in pieces, one for each entry, given the entries with the offsets of their contents."""
    yield b'{"version":1,"root":'
    opened = 0  # directories that are still open
    comma = b""
    for offset, (depth, path, mode, size, target) in located:
        text = b""
        if depth:
            close = b"}}" * (opened - depth)
            text = b"".join((close, b"," if close else comma, _string(path[path.rindex(b"/") + 1 :]), b":"))
        opened = depth
        comma = b","
        if stat.S_ISREG(mode):
            executable = b"true" if mode & stat.S_IXUSR else b"false"
            yield text + b'{"type":"regular","size":%d,"executable":%b,"narOffset":%d}' % (size, executable, offset)
        elif stat.S_ISLNK(mode):
            yield text + b'{"type":"symlink","target":%b}' % _string(target)
        else:
            yield text + b'{"type":"directory","entries":{'
            opened += 1
            comma = b""
    yield b"}}" * opened + b"}"

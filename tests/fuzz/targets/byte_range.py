"""Range and If-Range, with a size in front: what is given lies in what there is."""

from harmonia.server.http import byte_range
from harmonia.server.http.byte_range import UnsatisfiableError

WORDS = [b"bytes=", b"BYTES=", b"-", b",", b" ", b"\t", b"0", b"99999999999999999999", b'\n"etag"']


def check(data: bytes) -> bool:
    """The first line is what there is, the second Range, the third If-Range."""
    lines: list[str | None] = [*data.decode("utf-8", "surrogateescape").split("\n")]
    whole, header, if_range, *_ = [*lines, None, None]
    size = len(whole or "")
    wanted = byte_range.requested(header or "", if_range, '"etag"')
    if wanted is None:
        return False
    try:
        start, stop = byte_range.bounds(wanted, size)
    except UnsatisfiableError:
        return False
    assert 0 <= start < stop <= size
    # The same range, said in the one way that there is for all.
    assert byte_range.requested(f"bytes={start}-{stop - 1}", None, None) == (start, stop - 1)
    return True

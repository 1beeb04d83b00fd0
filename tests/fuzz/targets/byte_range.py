"""Range and If-Range, preceded by a size: bounds are always within the size."""

from harmonia.server.http import byte_range
from harmonia.server.http.byte_range import UnsatisfiableError

WORDS = [b"bytes=", b"BYTES=", b"-", b",", b" ", b"\t", b"0", b"99999999999999999999", b'\n"etag"']


def check(data: bytes) -> bool:
    """Take the first line's length as the size, the second line as Range, and the third as If-Range."""
    lines: list[str | None] = [*data.decode("utf-8", "surrogateescape").split("\n")]
    whole, header, if_range, *_ = [*lines, None, None]
    size = len(whole or "")
    range_ = byte_range.requested(header or "", if_range, '"etag"')
    if range_ is None:
        return False
    try:
        start, stop = byte_range.bounds(range_, size)
    except UnsatisfiableError:
        return False
    assert 0 <= start < stop <= size
    # The same range in its canonical form.
    assert byte_range.requested(f"bytes={start}-{stop - 1}", None, None) == (start, stop - 1)
    return True

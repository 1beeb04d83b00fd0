"""Via of requests: a field of any length is forwarded within bounds, and parses to the same."""

from harmonia.upstream.loop_guard import VIA, Via

WORDS = [b",", b" ", b"(", b")", b"1.1 ", b"harmonia-0123456789abcdef"]
_US = "harmonia-00000000000000ff"


def check(data: bytes) -> bool:
    via = Via.parse(data.decode("utf-8", "surrogateescape"))
    again = Via.parse(via.headers(_US)[VIA])
    assert via.is_loop(_US) or again == Via((*via.through, _US), via.asked)
    return bool(via.through)

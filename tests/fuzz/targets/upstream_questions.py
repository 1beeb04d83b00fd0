"""What other Harmonias say of the way of a question: of any length, it is repeated within bounds and reads the same."""

from harmonia.upstream.loop_guard import ASKED, HOPS, Hops

WORDS = [b",", b" ", b"\n", b"0123456789abcdef"]


def check(data: bytes) -> bool:
    through, _, asked = data.decode("utf-8", "surrogateescape").partition("\n")
    hops = Hops.parse(through, asked)
    headers = hops.headers("us", [])
    again = Hops.parse(headers[HOPS], headers[ASKED])
    assert hops.is_over("us") or again == Hops((*hops.through, "us"), hops.asked)
    return bool(hops.through)

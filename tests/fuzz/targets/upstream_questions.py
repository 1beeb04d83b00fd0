"""What other Harmonias say of the way of a question: of any length, it is repeated within bounds and reads the same."""

from harmonia.upstream.client import ASKED, HOPS
from harmonia.upstream.question import Hops

WORDS = [b",", b" ", b"\n", b"0123456789abcdef"]


def check(data: bytes) -> bool:
    through, _, asked = data.decode("utf-8", "surrogateescape").partition("\n")
    hops = Hops.parse(through, asked)
    headers = hops.headers("us", [])
    again = Hops.parse(headers[HOPS], headers[ASKED])
    assert len(through) + len(asked) > 8000 or again == Hops((*hops.through, "us"), hops.asked)
    return bool(hops.through)

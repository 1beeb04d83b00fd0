"""Accept-Encoding: any text is handled, and elements about other codings change nothing."""

from harmonia.server.http.negotiation import NotAcceptable, prefers_zstd, weights

WORDS = [b"zstd", b"identity", b"gzip", b"*", b";q=", b"; q=0", b"1.000", b"0.001", b", ", b"deflate, gzip, br, zstd"]


def _answer(header: str, *, worthwhile: bool) -> bool | None:
    try:
        return prefers_zstd(header, worthwhile=worthwhile)
    except NotAcceptable:
        return None


def check(data: bytes) -> bool:
    header = data.decode("utf-8", "surrogateescape")
    assert all(0 <= weight <= 1 for weight in weights(header).values())
    answers = [_answer(header, worthwhile=worthwhile) for worthwhile in (True, False)]
    assert answers[0] in {answers[1], True}
    if header.isascii():
        assert _answer(f"x-other;q=0.3,,{header.swapcase()},:", worthwhile=True) == answers[0]
    return answers[0] is not None

"""Header fields of upstreams are parsed in all their forms."""

import time
from email.utils import formatdate

import pytest
from multidict import CIMultiDict, CIMultiDictProxy

from harmonia.upstream.header_fields import accepts_ranges, content_range_start, elements, retry_after_s


def headers(name: str, *lines: str) -> CIMultiDictProxy[str]:
    return CIMultiDictProxy(CIMultiDict((name, line) for line in lines))


@pytest.mark.parametrize(
    "lines", [("gzip, br",), ("gzip", "br"), (" GZip ,\t BR ",), (",gzip,,br,",), ("", "gzip", "", "br"), ("gzip,br",)]
)
def test_list_on_one_line_equals_list_on_many_lines(lines: tuple[str, ...]) -> None:
    assert list(elements(headers("Content-Encoding", *lines), "content-encoding")) == ["gzip", "br"]


@pytest.mark.parametrize(
    ("lines", "accepted"),
    [
        (("bytes",), True),
        (("Bytes ",), True),
        (("pages, bytes",), True),
        (("pages", "bytes"), True),
        (("none",), False),
        (("",), False),
        ((), False),
        (("megabytes",), False),
    ],
)
def test_ranges_are_accepted_if_bytes_is_one_of_the_units(lines: tuple[str, ...], *, accepted: bool) -> None:
    assert accepts_ranges(headers("Accept-Ranges", *lines)) is accepted


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("bytes 5-9/10", 5),
        (" Bytes  005-9/* ", 5),
        ("bytes\t5 - 9 / 10", 5),
        ("bytes */10", None),
        ("bytes=5-9/10", None),
        ("pages 5-9/10", None),
        ("bytes 5-9", None),
        ("bytes " + "9" * 5000 + "-9/10", None),
        ("bytes \u0665-9/10", None),
        ("", None),
    ],
)
def test_first_byte_of_content_range_is_parsed(text: str, start: int | None) -> None:
    assert content_range_start(headers("Content-Range", text)) == start


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [
        ("7", 7, 7),
        (" 007 ", 7, 7),
        (formatdate(0, usegmt=True), 0, 0),
        ("9" * 5000, 0, 0),
        ("nan", 0, 0),
        ("inf", 0, 0),
        ("-3", 0, 0),
        ("1e3", 0, 0),
        ("Thu, 99 Foo 99999 99:99:99 GMT", 0, 0),
        ("", 0, 0),
    ],
)
def test_retry_after_is_seconds_or_a_date(text: str, least: float, most: float) -> None:
    assert least <= retry_after_s(headers("Retry-After", text)) <= most


@pytest.mark.parametrize("form", ["%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %e %H:%M:%S %Y"])
def test_retry_after_accepts_every_date_format(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """RFC 9110 section 5.6.7. The test makes the date when it runs, which may be long after its collection."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")  # all three are in UTC, whatever the time zone
    time.tzset()
    text = time.strftime(form, time.gmtime(time.time() + 1000))
    try:
        assert 1 <= retry_after_s(headers("Retry-After", text)) <= 1000
    finally:
        monkeypatch.undo()
        time.tzset()

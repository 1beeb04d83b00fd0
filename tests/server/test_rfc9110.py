"""RFC 9110, HTTP semantics: the requirements of sections 6 to 15 on an origin server, on a real socket.

Each row has the section, its requirement, the request, and the expected response. `{etag}` is the resource's ETag.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import pytest

from harmonia.tools.store_builder import StoreBuilder
from support.running import Answer, Server
from support.shared_store import info, url

YESTERDAY = "Sat, 28 Nov 2026 08:00:00 GMT"


class Clause(NamedTuple):
    section: str
    requirement: str
    sent: Mapping[str, str]
    status: int
    method: str = "GET"
    on: str = "nar"
    """`nar` has an ETag and ranges, `narinfo` only an ETag, `info` neither, and `none` does not exist."""
    has: Mapping[str, str] = {}
    """Expected fields of the response."""
    lacks: tuple[str, ...] = ()


def nar(section: str, requirement: str, status: int, **fields: str) -> Clause:
    return Clause(section, requirement, {name.replace("_", "-"): value for name, value in fields.items()}, status)


CLAUSES = [
    # Methods
    Clause("9.1", "MUST support HEAD", {}, 200, method="HEAD"),
    Clause("9.1", "405 to a known method that is not allowed", {}, 405, method="PUT", has={"allow": "GET, HEAD"}),
    Clause("9.1", "501 to an unknown method", {}, 501, method="BREW"),
    Clause("9.3.8", "TRACE is not allowed", {}, 405, method="TRACE", has={"allow": "GET, HEAD"}),
    Clause("9.3.7", "OPTIONS is not allowed", {}, 405, method="OPTIONS", has={"allow": "GET, HEAD"}),
    Clause("10.1.1", "417 to an unknown expectation", {"Content-Length": "0", "Expect": "x"}, 417),
    Clause("10.1.1", "100-continue without a body is ignored", {"Expect": "100-continue"}, 200),
    # Conditions: one by one, and their precedence
    nar("13.1.1", "If-Match: the current ETag", 200, If_Match="{etag}"),
    nar("13.1.1", "If-Match: one of several", 200, If_Match='"a", {etag}'),
    nar("13.1.1", "If-Match: `*` if the resource exists", 200, If_Match="*"),
    nar("13.1.1", "If-Match: MUST answer 412 to another ETag", 412, If_Match='"another"'),
    nar("13.1.1", "If-Match: MUST compare strongly", 412, If_Match="W/{etag}"),
    nar("13.1.1", "If-Match: not an ETag", 412, If_Match="nonsense"),
    Clause("13.1.1", "If-Match: also for HEAD", {"If-Match": '"another"'}, 412, method="HEAD"),
    Clause("13.1.1", "If-Match: `*` without an ETag", {"If-Match": "*"}, 200, on="info"),
    Clause("13.1.1", "If-Match: an ETag for a resource without one", {"If-Match": '"a"'}, 412, on="info"),
    nar("13.1.2", "If-None-Match: 304 to the current ETag", 304, If_None_Match="{etag}"),
    nar("13.1.2", "If-None-Match: MUST compare weakly", 304, If_None_Match="W/{etag}"),
    nar("13.1.2", "If-None-Match: one of several", 304, If_None_Match='"a,b" , {etag}'),
    nar("13.1.2", "If-None-Match: `*` if the resource exists", 304, If_None_Match="*"),
    nar("13.1.2", "If-None-Match: 200 to another ETag", 200, If_None_Match='"another"'),
    nar("13.1.2", "If-None-Match: a part of an ETag is another ETag", 200, If_None_Match='"a{etag}'),
    Clause("13.1.2", "If-None-Match: also for HEAD", {"If-None-Match": "{etag}"}, 304, method="HEAD"),
    Clause("13.1.2", "If-None-Match: `*` without an ETag", {"If-None-Match": "*"}, 304, on="info"),
    nar("13.1.3", "If-Modified-Since: MUST be ignored without a date", 200, If_Modified_Since="{yesterday}"),
    nar("13.1.3", "If-Modified-Since: MUST ignore an invalid date", 200, If_Modified_Since="nonsense"),
    nar("13.1.4", "If-Unmodified-Since: MUST be ignored without a date", 200, If_Unmodified_Since="{yesterday}"),
    nar("13.1.4", "If-Unmodified-Since: MUST ignore an invalid date", 200, If_Unmodified_Since="nonsense"),
    nar("13.1.5", "If-Range: the current ETag", 206, Range="bytes=0-9", If_Range="{etag}"),
    nar("13.1.5", "If-Range: MUST ignore Range otherwise", 200, Range="bytes=0-9", If_Range='"another"'),
    nar("13.1.5", "If-Range: MUST compare strongly", 200, Range="bytes=0-9", If_Range="W/{etag}"),
    nar("13.1.5", "If-Range: a date for a resource without one", 200, Range="bytes=0-9", If_Range="{yesterday}"),
    nar("13.1.5", "If-Range: MUST be ignored without Range", 200, If_Range='"another"'),
    nar(
        "13.1.5",
        "If-Range: a range beyond the end, with another ETag",
        200,
        Range="bytes=99999999-",
        If_Range='"another"',
    ),
    Clause("13.2.1", "conditions MUST be ignored if the resource does not exist", {"If-Match": '"a"'}, 404, on="none"),
    Clause("13.2.1", "If-None-Match MUST be ignored, too", {"If-None-Match": "*"}, 404, on="none"),
    Clause("13.2.1", "conditions MUST be ignored by other methods", {"If-Match": '"a"'}, 405, method="PUT"),
    nar("13.2.2", "If-Match comes before If-None-Match", 412, If_Match='"another"', If_None_Match="{etag}"),
    nar("13.2.2", "If-None-Match comes after If-Match", 304, If_Match="{etag}", If_None_Match="{etag}"),
    nar(
        "13.2.2",
        "If-None-Match comes before If-Modified-Since",
        200,
        If_None_Match='"a"',
        If_Modified_Since="{yesterday}",
    ),
    nar("13.2.2", "conditions come before Range", 304, If_None_Match="{etag}", Range="bytes=0-9"),
    nar("13.2.2", "conditions come before an unsatisfiable Range", 412, If_Match='"a"', Range="bytes=99999999-"),
    # Ranges
    nar("14.1.1", "the first bytes", 206, Range="bytes=0-9"),
    nar("14.1.1", "a unit is case-insensitive", 206, Range="Bytes=0-9"),
    nar("14.1.2", "from one byte to the end", 206, Range="bytes=10-"),
    nar("14.1.2", "the last bytes", 206, Range="bytes=-10"),
    nar("14.1.2", "more last bytes than the resource has", 206, Range="bytes=-99999999"),
    nar("14.1.2", "a last position beyond the end", 206, Range="bytes=0-99999999"),
    nar("14.1.2", "backwards is invalid, and ignored", 200, Range="bytes=9-0"),
    nar("14.2", "MUST ignore an unknown unit", 200, Range="items=0-9"),
    nar("14.2", "MAY ignore a malformed range", 200, Range="bytes 0-9"),
    nar("14.2", "MAY ignore several ranges", 200, Range="bytes=0-1,3-4"),
    Clause("14.2", "MUST ignore Range of HEAD", {"Range": "bytes=0-9"}, 200, method="HEAD", lacks=("content-range",)),
    Clause("14.2", "MUST ignore an unsatisfiable Range of HEAD", {"Range": "bytes=99999999-"}, 200, method="HEAD"),
    Clause(
        "14.2", "a resource need not support ranges", {"Range": "bytes=0-9"}, 200, on="info", lacks=("content-range",)
    ),
    Clause("14.3", "Accept-Ranges is sent", {}, 200, has={"accept-ranges": "bytes"}),
    Clause("14.4", "416: the length", {"Range": "bytes=99999999-"}, 416, has={"content-range": "bytes \\*/{size}"}),
    Clause("14.4", "206 has the range", {"Range": "bytes=0-9"}, 206, has={"content-range": "bytes 0-9/{size}"}),
    # Status codes
    Clause(
        "15.3.7",
        "206 MUST have the fields of 200",
        {"Range": "bytes=0-9"},
        206,
        has={"etag": ".+", "cache-control": ".+", "vary": "Accept-Encoding", "content-length": "10"},
    ),
    Clause(
        "15.4.5",
        "304 MUST have the validators of 200, and SHOULD NOT have more",
        {"If-None-Match": "*"},
        304,
        has={"etag": ".+", "cache-control": ".+", "vary": "Accept-Encoding"},
        lacks=("content-type", "content-length", "content-encoding", "transfer-encoding"),
    ),
    Clause("15.5.5", "404", {}, 404, on="none"),
    Clause("15.5.6", "405 MUST have Allow", {}, 405, method="DELETE", has={"allow": "GET, HEAD"}),
    Clause("15.5.7", "406 if nothing is acceptable", {"Accept-Encoding": "*;q=0"}, 406),
    Clause("15.5.13", "412", {"If-Match": '"a"'}, 412, lacks=("etag",)),
    Clause("15.5.17", "416 SHOULD have Content-Range", {"Range": "bytes=-0"}, 416, has={"content-range": ".+"}),
]


@pytest.mark.parametrize("clause", CLAUSES, ids=lambda clause: f"{clause.section}: {clause.requirement}")
def test_requirement_is_met(server: Server, shared_store: StoreBuilder, clause: Clause) -> None:
    tree = info(shared_store, "tree")
    hash_part = tree.path.hash_part
    paths = {
        "nar": url(server, hash_part),
        "narinfo": f"/{hash_part}.narinfo",
        "info": "/nix-cache-info",
        "none": f"/{'0' * 32}.narinfo",
    }
    path = paths[clause.on]
    whole = server.get(path)
    known = {"etag": whole.headers.get("etag", ""), "yesterday": YESTERDAY, "size": str(len(whole.body))}
    sent = {name: value.format(**known) for name, value in clause.sent.items()}
    answer = server.request(clause.method, path, sent)
    assert answer.status == clause.status
    check_body(answer, clause.method, whole)
    for name, pattern in clause.has.items():
        assert re.fullmatch(pattern.format(**known), answer.headers[name])
    assert not set(clause.lacks) & answer.headers.keys()


def check_body(answer: Answer, method: str, whole: Answer) -> None:
    """Check that status and fields describe the body (sections 6.4, 8.6 and 14.4)."""
    if method == "HEAD" or answer.status == 304:
        assert answer.body == b""
    elif answer.status == 200:
        assert answer.body == whole.body
    elif answer.status == 206:
        first, last, size = map(int, re.findall(r"\d+", answer.headers["content-range"]))
        assert (answer.body, size) == (whole.body[first : last + 1], len(whole.body))
    else:
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["content-length"] == str(len(answer.body))


def test_cache_control_of_nars_has_no_transform(server: Server, shared_store: StoreBuilder) -> None:
    """RFC 9110 section 7.7: a proxy that recompresses a NAR would break ranges."""
    path = url(server, info(shared_store, "tree").path.hash_part)
    for asked in (path, f"{path}.zst"):
        assert "no-transform" in server.get(asked).headers["cache-control"]

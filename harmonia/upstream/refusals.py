"""Refusals: answers of upstreams that we do not take. Each is counted, and logged with what would mend it."""

import logging
from enum import StrEnum
from threading import Lock
from time import monotonic
from typing import Self

from harmonia.errors import UpstreamError
from harmonia.metrics.shared_counters import UpstreamCounters
from harmonia.untrusted import excerpt

_LOG_INTERVAL_S = 3600.0

_log = logging.getLogger("harmonia")


class Reason(StrEnum):
    """Why an answer is refused: a value of the metric's label, and what would mend it."""

    remedy: str

    def __new__(cls, value: str, remedy: str) -> Self:
        member = str.__new__(cls, value)
        member._value_ = value
        member.remedy = remedy
        return member

    REDIRECT_ELSEWHERE = "redirect_elsewhere", "set its url to the one that it redirects to"
    REDIRECT_TO_HTTP = "redirect_to_http", "have it redirect to https, or set its url to the http one"
    REDIRECT_MALFORMED = "redirect_malformed", "correct the redirects of that server"
    TOO_MANY_REDIRECTS = "too_many_redirects", "set its url to the one at the end of the redirects"
    TOO_LONG = "too_long", "check that its url is that of a binary cache"
    ENCODING = "encoding", "have it send no Content-Encoding, or a valid one of br, gzip, deflate, zstd, xz, bzip2"
    PRIVATE_ADDRESS = "private_address", "if you trust the server at that address, make it an upstream of its own"
    PROXY = "proxy", "let the proxy allow this host, correct its password, or except the host in no_proxy"
    BUSY = "busy", "raise workers, or give this upstream a higher priority number than faster ones"
    MALFORMED_NARINFO = (
        "malformed_narinfo",
        "check that its url is that of a binary cache; have it write this file anew",
    )
    WRONG_PATH = "wrong_path", "have it write the narinfo of this path anew"
    WRONG_STORE_DIR = "wrong_store_dir", "remove this upstream, or set virtual_nix_store to its store directory"
    NOT_SIGNED = "not_signed", "add the key that signs its paths to public_keys, or have it sign them"
    COMPRESSION = "compression", "have it compress by xz or zstd with a usual level, or set mode = 'redirect' for it"
    URL_MALFORMED = "url_malformed", "have it write the file anew, with a relative or http(s) URL"
    URL_ELSEWHERE = "url_elsewhere", "set public_keys for it, and have it name NARs by relative URLs below nar/"
    MISSING_NAR = "missing_nar", "have it remove the narinfo, or restore the NAR"
    WRONG_NAR = "wrong_nar", "have it remove the NAR and its narinfo, and upload the path again"
    MALFORMED_JSON = "malformed_json", "have it write the file anew"


class UpstreamMismatchError(UpstreamError):
    """An answer that is not taken."""

    def __init__(self, base: str, reason: Reason, why: str) -> None:
        super().__init__(f"{base}: {why}")
        self.reason = reason
        self.why = why


class Refusals:
    """Those of one upstream, in this worker. May be used by several threads."""

    def __init__(self, base: str, counters: UpstreamCounters) -> None:
        self._base = base
        self._counters = counters
        self._silent_until: dict[Reason, float] = {}
        self._lock = Lock()

    def note(self, asked: str, reason: Reason, why: str) -> None:
        """Count a refusal, and log it if this reason was not logged within the last hour.

        `asked` is the URL or the path of the question.
        """
        self._counters.refuse(reason)
        if self._is_due(reason):
            asked = excerpt(asked.removeprefix(f"{self._base}/"))
            _log.warning("upstream %s: refused %s: %s; %s (%s)", self._base, asked, why, reason.remedy, reason)

    def refuse(self, asked: str, reason: Reason, why: str) -> UpstreamMismatchError:
        """Note a refusal, and return it to be raised."""
        self.note(asked, reason, why)
        return UpstreamMismatchError(self._base, reason, why)

    def _is_due(self, reason: Reason) -> bool:
        now = monotonic()
        with self._lock:
            if now < self._silent_until.get(reason, 0):
                return False
            self._silent_until[reason] = now + _LOG_INTERVAL_S
        return True

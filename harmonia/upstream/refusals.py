"""Refusals: responses of upstreams that are not used. Each is counted, and logged with its cause and a remedy."""

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
    """Reason of a refusal: the value of the metric's label `reason`, and the remedy for the log."""

    remedy: str

    def __new__(cls, value: str, remedy: str) -> Self:
        member = str.__new__(cls, value)
        member._value_ = value
        member.remedy = remedy
        return member

    REDIRECT_ELSEWHERE = "redirect_elsewhere", "set its url to the target of the redirect"
    REDIRECT_TO_HTTP = "redirect_to_http", "make it redirect to https, or set its url to the http URL"
    REDIRECT_MALFORMED = "redirect_malformed", "correct the redirects of that server"
    TOO_MANY_REDIRECTS = "too_many_redirects", "set its url to the last URL of the redirects"
    TOO_LONG = "too_long", "check that its url is the URL of a binary cache"
    ENCODING = "encoding", "make it send no Content-Encoding, or a valid one of br, gzip, deflate, zstd, xz, bzip2"
    PRIVATE_ADDRESS = "private_address", "if you trust the server at that address, add it as an upstream"
    PROXY = "proxy", "allow this host in the proxy, correct the proxy's password, or add the host to no_proxy"
    BUSY = "busy", "raise workers, or give this upstream a higher priority number than faster ones"
    MALFORMED_NARINFO = (
        "malformed_narinfo",
        "check that its url is the URL of a binary cache; make it write this file again",
    )
    WRONG_PATH = "wrong_path", "make it write the narinfo of this path again"
    WRONG_STORE_DIR = "wrong_store_dir", "remove this upstream, or set virtual_nix_store to its store directory"
    NOT_SIGNED = "not_signed", "add the key that signs its paths to public_keys, or make it sign them"
    COMPRESSION = "compression", "make it compress with xz or zstd at a usual level, or set mode = 'redirect' for it"
    URL_MALFORMED = "url_malformed", "make it write the file again, with a relative or http(s) URL"
    URL_ELSEWHERE = "url_elsewhere", "set public_keys for it, and make it use relative URLs below nar/"
    MISSING_NAR = "missing_nar", "make it remove the narinfo, or restore the NAR"
    WRONG_NAR = "wrong_nar", "remove the NAR and its narinfo there, and upload the path again"
    MALFORMED_JSON = "malformed_json", "make it write the file again"


class UpstreamMismatchError(UpstreamError):
    """A response that is refused."""

    def __init__(self, base: str, reason: Reason, why: str) -> None:
        super().__init__(f"{base}: {why}")
        self.reason = reason
        self.why = why


class Refusals:
    """Refusals of one upstream in this worker. Thread-safe."""

    def __init__(self, base: str, counters: UpstreamCounters) -> None:
        self._base = base
        self._counters = counters
        self._silent_until: dict[Reason, float] = {}
        self._lock = Lock()

    def note(self, resource: str, reason: Reason, why: str) -> None:
        """Count a refusal, and log it unless the same reason was logged within the last hour.

        `resource` is the URL or the path of the request, `why` the cause in words.
        """
        self._counters.refuse(reason)
        if self._is_due(reason):
            resource = excerpt(resource.removeprefix(f"{self._base}/"))
            _log.warning("upstream %s: refused %s: %s; %s (%s)", self._base, resource, why, reason.remedy, reason)

    def refuse(self, resource: str, reason: Reason, why: str) -> UpstreamMismatchError:
        """Count and log a refusal like `note`, and return the error for the caller to raise."""
        self.note(resource, reason, why)
        return UpstreamMismatchError(self._base, reason, why)

    def _is_due(self, reason: Reason) -> bool:
        now = monotonic()
        with self._lock:
            if now < self._silent_until.get(reason, 0):
                return False
            self._silent_until[reason] = now + _LOG_INTERVAL_S
        return True

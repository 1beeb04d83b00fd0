"""What is true of the server, whatever it serves: it is reached, its certificate is good, and its clock is right."""

import ssl
import time
from email.utils import parsedate_to_datetime

from harmonia.client import Answer, Client
from harmonia.doctor.finding import Finding, Findings

_CLOCK = 60  # seconds of difference from which HTTP caches, and certificates, begin to suffer
_EXPIRY = 14 * 86400  # seconds before a certificate's end at which somebody should know


def unreachable(what: str) -> str:
    if "certificate" in what:
        return "serve the whole chain, for this host name; a private authority's certificate goes to NIX_SSL_CERT_FILE"
    return "see that the server runs, that this is its URL, and that no firewall is in between"


def tls(client: Client, answer: Answer) -> Findings:
    if not answer.certificate:
        if client.url.startswith("http:"):
            yield Finding(
                "TLS", "skipped", "plain HTTP: signatures protect what is downloaded, but anybody can watch it"
            )
        return
    left = ssl.cert_time_to_seconds(str(answer.certificate["notAfter"])) - time.time()
    what = f"the certificate is trusted, and valid for {left / 86400:.0f} more days"
    if left < _EXPIRY:
        yield Finding("TLS", "warning", what, "renew it now, and see why that did not happen by itself")
    else:
        yield Finding("TLS", "ok", what)


def clock(answer: Answer) -> Findings:
    try:
        date = parsedate_to_datetime(answer.headers["date"]).timestamp()
    except (KeyError, ValueError):
        yield Finding(
            "clock", "warning", "answers have no Date", "send one: HTTP caches reckon the age of answers by it"
        )
        return
    skew = date - time.time()
    if abs(skew) > _CLOCK:
        what = f"the server's clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} ours"
        yield Finding("clock", "warning", what, "set both by NTP: timedatectl set-ntp true")
    else:
        yield Finding("clock", "ok", "the server's clock and ours agree")

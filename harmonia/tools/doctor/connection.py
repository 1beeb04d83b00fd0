"""Checks of the connection: reachability, TLS certificate, clock."""

import ssl
import time
from email.utils import parsedate_to_datetime

from harmonia.errors import ConfigError, RemoteError
from harmonia.tools.doctor.finding import Finding, Findings
from harmonia.tools.http_client import Answer, Client

_CLOCK_SKEW_S = 60  # a larger difference disturbs HTTP caches and certificates
_EXPIRY_WARNING_S = 14 * 86400  # warn this long before a certificate expires
_UNTRUSTED = "its certificate is not trusted"
_PLAIN = "if that port serves plain HTTP, use http://"
_NOBODY = "check that the server runs, that the URL is right, and that no firewall blocks it"
# Part of the error of the client or OpenSSL, and the remedy. The first match counts.
_REMEDIES = (
    ("certificate has expired", "renew it, then reload the server (Harmonia: SIGHUP)"),
    (
        "certificate is not yet valid",
        "synchronise the clocks here and on the issuing machine by NTP: timedatectl set-ntp true",
    ),
    (
        "mismatch, certificate",
        "get a certificate for this name, or use the certificate's name in the URL or in base_url",
    ),
    (
        _UNTRUSTED,
        "serve the whole certificate chain; for a private authority, set NIX_SSL_CERT_FILE to its certificate",
    ),
    ("[SSL", _PLAIN),
    ("handshake operation", _PLAIN),
    (
        "Remote end closed",
        "check the server's log; with tls_client_ca_path, the server accepts only clients with a certificate",
    ),
)


def unreachable(client: Client, error: RemoteError) -> Finding:
    """Return the finding for a server that cannot be reached."""
    what = str(error)
    remedy = https_remedy(client) or next((remedy for words, remedy in _REMEDIES if words in what), _NOBODY)
    return Finding("connection", "error", what, remedy)


def https_remedy(client: Client) -> str | None:
    """Return a remedy if the URL is http:// and the server uses TLS, otherwise None.

    Asks by https://, because servers report the mistake in different ways.
    """
    if not client.url.startswith("http:"):
        return None
    other = Client(client.url.replace("http:", "https:", 1), direct=client.is_direct)
    try:
        other.get("nix-cache-info")
    except ConfigError:  # NIX_SSL_CERT_FILE is wrong, but the given URL does not need it
        return None
    except RemoteError as error:
        if _UNTRUSTED not in str(error):
            return None
    return f"the server uses TLS: use {other.url}"


def tls(client: Client, answer: Answer) -> Findings:
    if not answer.certificate:
        if client.url.startswith("http:"):
            yield Finding(
                "TLS",
                "skipped",
                "plain HTTP: signatures protect the content of downloads, but anyone on the network can read them",
            )
        return
    left = ssl.cert_time_to_seconds(str(answer.certificate["notAfter"])) - time.time()
    what = f"the certificate is trusted, and valid for {left / 86400:.0f} more days"
    if left < _EXPIRY_WARNING_S:
        yield Finding("TLS", "warning", what, "renew it now, and find out why automatic renewal failed")
    else:
        yield Finding("TLS", "ok", what)


def clock(answer: Answer) -> Findings:
    try:
        date = parsedate_to_datetime(answer.headers["date"]).timestamp()
    except (KeyError, ValueError):
        yield Finding(
            "clock",
            "warning",
            "responses have no Date header",
            "send one: HTTP caches need it to compute the age of responses",
        )
        return
    skew = date - time.time()
    if abs(skew) > _CLOCK_SKEW_S:
        what = f"the server's clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} ours"
        yield Finding("clock", "warning", what, "synchronise both by NTP: timedatectl set-ntp true")
    else:
        yield Finding("clock", "ok", "the server's clock and ours agree")

"""What is true of the server, whatever it serves: it is reached, its certificate is good, and its clock is right."""

import ssl
import time
from email.utils import parsedate_to_datetime

from harmonia.errors import ConfigError, RemoteError
from harmonia.tools.doctor.finding import Finding, Findings
from harmonia.tools.http_client import Answer, Client

_CLOCK_SKEW_S = 60  # seconds of difference from which HTTP caches, and certificates, begin to suffer
_EXPIRY_WARNING_S = 14 * 86400  # seconds before a certificate's end at which somebody should know
_UNTRUSTED = "its certificate is not trusted"
_PLAIN = "if that port speaks plain HTTP, ask it by http://"
_NOBODY = "see that the server runs, that this is its URL, and that no firewall is in between"
# By what the client and OpenSSL say: the first that fits.
_REMEDIES = (
    ("certificate has expired", "renew it, and have the server read it again: Harmonia does so on SIGHUP"),
    ("certificate is not yet valid", "set the clocks by NTP, here and where it was made: timedatectl set-ntp true"),
    (
        "mismatch, certificate",
        "get one for this name, or ask by the certificate's: give that URL, or set base_url to it",
    ),
    (_UNTRUSTED, "serve the whole chain; a private authority's certificate goes to NIX_SSL_CERT_FILE"),
    ("[SSL", _PLAIN),
    ("handshake operation", _PLAIN),
    ("Remote end closed", "look at the server's log; with tls_client_ca_path, it takes only who has a certificate"),
)


def unreachable(client: Client, error: RemoteError) -> Finding:
    what = str(error)
    remedy = secure(client) or next((remedy for words, remedy in _REMEDIES if words in what), _NOBODY)
    return Finding("connection", "error", what, remedy)


def secure(client: Client) -> str | None:
    """A remedy where a server that speaks TLS is asked without, which servers tell each in a way of its own."""
    if not client.url.startswith("http:"):
        return None
    other = Client(client.url.replace("http:", "https:", 1), direct=client.is_direct)
    try:
        other.get("nix-cache-info")
    except ConfigError:  # nobody asked for TLS
        return None
    except RemoteError as error:
        if _UNTRUSTED not in str(error):
            return None
    return f"it speaks TLS: ask {other.url}"


def tls(client: Client, answer: Answer) -> Findings:
    if not answer.certificate:
        if client.url.startswith("http:"):
            yield Finding(
                "TLS", "skipped", "plain HTTP: signatures protect what is downloaded, but anybody can watch it"
            )
        return
    left = ssl.cert_time_to_seconds(str(answer.certificate["notAfter"])) - time.time()
    what = f"the certificate is trusted, and valid for {left / 86400:.0f} more days"
    if left < _EXPIRY_WARNING_S:
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
    if abs(skew) > _CLOCK_SKEW_S:
        what = f"the server's clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} ours"
        yield Finding("clock", "warning", what, "set both by NTP: timedatectl set-ntp true")
    else:
        yield Finding("clock", "ok", "the server's clock and ours agree")

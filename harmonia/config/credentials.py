"""What the settings name files of: keys to sign with, tokens, certificates, and passwords for upstream caches.

All of it is read anew at each call. ConfigError where a file is not what it should be; no message quotes one.
"""

import base64
import netrc
import ssl
from typing import BinaryIO
from urllib.parse import urlsplit

from harmonia.config import tokens
from harmonia.config.settings import Settings, WrongSettingError
from harmonia.config.tokens import Token
from harmonia.errors import FormatError
from harmonia.nix.signing import SecretKey

_NOT_A_PAIR = {"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"}


def secret_keys(settings: Settings) -> tuple[SecretKey, ...]:
    """The keys to sign with, in the order of their files."""
    keys = []
    for path in settings.sign_key_paths:
        with open_file("sign_key_paths", path, "name a file with a secret key") as file:
            try:
                keys.append(SecretKey.parse(file.read().decode()))
            except (FormatError, UnicodeDecodeError):
                # The parser's own words may quote the file, which may hold some other secret.
                what = f"no secret key in {path!r}; make one with harmonia keygen"
                raise WrongSettingError(what, "sign_key_paths", key_file=path) from None
    return tuple(keys)


def load_tokens(settings: Settings) -> tuple[Token, ...]:
    """Those that are let in, read anew from their file."""
    if settings.tokens_path is None:
        return ()
    with open_file("tokens_path", settings.tokens_path, "name a file with the lines that harmonia token tells") as file:
        try:
            return tokens.parse(file.read().decode())
        except UnicodeDecodeError:
            what = "is not UTF-8"
        except FormatError as error:
            what = f"is not right: {error}"
    raise WrongSettingError(f"{settings.tokens_path!r} {what}; harmonia token tells how a line looks", "tokens_path")


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """What TLS is served with, read anew from its two files; None without TLS."""
    if settings.tls_cert_path is None or settings.tls_key_path is None:
        return None
    for key in ("tls_cert_path", "tls_key_path"):
        open_file(key, getattr(settings, key), "name a readable PEM file").close()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load_certificates(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), "tls_cert_path", settings.tls_cert_path)
    try:
        # With a password given, a key that needs one fails here instead of asking at the terminal.
        context.load_cert_chain(settings.tls_cert_path, settings.tls_key_path, password="")
    except ssl.SSLError as error:
        raise _wrong_pair(settings, error.reason or "") from None
    if settings.tls_client_ca_path is not None:
        open_file("tls_client_ca_path", settings.tls_client_ca_path, "name a readable PEM file").close()
        _load_certificates(context, "tls_client_ca_path", settings.tls_client_ca_path)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _wrong_pair(settings: Settings, reason: str) -> WrongSettingError:
    """Which of the two files is wrong, by OpenSSL's reason. It has none for what it cannot read."""
    cert, key = settings.tls_cert_path, settings.tls_key_path
    if reason in _NOT_A_PAIR:
        what = f"{key!r} is not the key of the first certificate in {cert!r}; give the two that belong together"
    elif reason.endswith(("TOO_SMALL", "TOO_WEAK")):
        why = reason.lower().replace("_", " ")
        return WrongSettingError(f"{cert!r} is too weak for OpenSSL: {why}; make a stronger one", "tls_cert_path")
    else:
        what = f"no private key in {key!r} that can be read; give it in PEM form, without a passphrase"
    return WrongSettingError(what, "tls_key_path")


def _load_certificates(context: ssl.SSLContext, key: str, path: str) -> None:
    """Have the context trust those of that file."""
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        what = f"no certificates in {path!r} ({error.reason or 'not PEM'}); give them as PEM"
        raise WrongSettingError(what, key) from None


def complaint(settings: Settings, context: ssl.SSLContext) -> str | None:
    """What clients have against the certificate that is served with that context, even if they trust who made it."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # it vouches for itself
    client.load_verify_locations(settings.tls_cert_path)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking, answering = client.wrap_bio(back, there), context.wrap_bio(there, back, server_side=True)
    for side in (asking, answering, asking):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLError as error:
            return str(getattr(error, "verify_message", error.reason))
    return None


def authorization(settings: Settings, number: int) -> str | None:
    """The Authorization for that upstream, read from its file; None where it wants none."""
    upstream = settings.upstream[number]
    given = {"netrc": upstream.netrc, "credentials_file": upstream.credentials_file}
    for key, path in given.items():
        if path is None:
            continue
        key_path = ("upstream", str(number), key)
        try:
            if key == "netrc":
                found = netrc.netrc(path).authenticators(urlsplit(upstream.url).hostname or "")
                user, password = (found[0], found[2]) if found else ("", "")
            else:
                with open(path, encoding="utf-8") as file:
                    user, _, password = file.read().rstrip("\n").partition(":")
        except (OSError, UnicodeDecodeError, netrc.NetrcParseError) as error:
            what = getattr(error, "strerror", None) or "not of its format"
            raise WrongSettingError(f"cannot read {path!r}: {what}; name a readable file", *key_path) from None
        if not user or not password or "\n" in user + password:
            line = "machine HOST login USER password PASSWORD" if key == "netrc" else "USER:PASSWORD"
            what = f"no user and password for this upstream in {path!r}; give them there as {line}"
            raise WrongSettingError(what, *key_path)
        return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
    return None


def upstream_tls(settings: Settings, number: int) -> ssl.SSLContext:
    """What that upstream's certificate is checked with."""
    path = settings.upstream[number].ca_file
    try:
        return ssl.create_default_context(cafile=path)
    except OSError as error:
        what = error.reason if isinstance(error, ssl.SSLError) else error.strerror
        what = f"cannot read {path!r}: {what or 'not PEM'}; name a file with certificates in PEM form"
        raise WrongSettingError(what, "upstream", str(number), "ca_file") from None


def open_file(key: str, path: str, remedy: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        what = f"cannot read {path!r}: {error.strerror}; {remedy}"
        raise WrongSettingError(what, key, key_file=path) from None

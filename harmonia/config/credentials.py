"""What the settings name files of: keys to sign with, tokens, certificates, and passwords for upstream caches.

All of it is read anew at each call. ConfigError where a file is not what it should be; no message quotes one.
"""

import re
import ssl
from typing import BinaryIO
from urllib.parse import urlsplit

from harmonia.config import netrc, tokens
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
    """Return the Authorization for that upstream, read from its file, or None if its netrc has none for its host."""
    upstream = settings.upstream[number]
    key = "netrc" if upstream.netrc is not None else "credentials_file"
    path = getattr(upstream, key)
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            content = file.read(netrc.MAX_BYTES + 1)
        if key == "netrc":
            return netrc.authorization(content, urlsplit(upstream.url).hostname or "")
        return _credentials(content)
    except OSError as error:
        what = f"cannot read {path!r}: {error.strerror}; name a readable file"
    except FormatError as error:
        what = f"cannot use {path!r}: {error}"
    raise WrongSettingError(what, "upstream", str(number), key)


def _credentials(content: bytes) -> str:
    """Return the Authorization of a `credentials_file`. A token has no user, or no password."""
    user, colon, password = content.rstrip(b"\r\n").partition(b":")
    if not colon or not (user or password) or re.search(rb"[\r\n]", user + password):
        raise FormatError("it has no user and password; give one line USER:PASSWORD, or :TOKEN")
    return netrc.basic(user, password)


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

"""Credentials from the files that the settings name: signing keys, tokens, certificates and upstream passwords.

Each call reads the files of its settings again. Each function raises ConfigError if a file cannot be read or used; no
message quotes the content of a file.
"""

import re
import ssl
from collections.abc import Mapping
from functools import cache
from typing import BinaryIO
from urllib.parse import urlsplit

from harmonia.config import netrc, tokens
from harmonia.config.settings import Settings
from harmonia.config.tokens import Token
from harmonia.config.wrong_setting import WrongSettingError
from harmonia.errors import ConfigError, FormatError, HarmoniaError
from harmonia.nix.signing import SecretKey

_NOT_A_PAIR = {"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"}


def secret_keys(settings: Settings) -> tuple[SecretKey, ...]:
    """Return the signing keys, in the order of `sign_key_paths`."""
    return tuple(_secret_key(path, "sign_key_paths") for path in settings.sign_key_paths)


def watch_authorization(settings: Settings, url: str) -> str | None:
    """Return the value of Authorization for the host of `url`, or None without `watch.netrc`."""
    path = settings.watch.netrc
    if path is None:
        return None
    with open_file(("watch", "netrc"), path, "name a readable file") as file:
        try:
            found = netrc.authorization(file.read(netrc.MAX_BYTES + 1), urlsplit(url).hostname or "")
        except FormatError as error:
            raise WrongSettingError(f"cannot use {path!r}: {error}", "watch", "netrc", key_file=path) from None
    if found is None:
        what = f"no entry for {urlsplit(url).hostname} in {path!r}; add one, or remove this"
        raise WrongSettingError(what, "watch", "netrc", key_file=path)
    return found


def push_key(settings: Settings) -> SecretKey | None:
    """Return the key that signs pushed paths, or None without `push.sign_key_path`."""
    path = settings.push.sign_key_path
    return None if path is None else _secret_key(path, "push", "sign_key_path")


def load_secret_key(path: str) -> SecretKey:
    """Return the key in a file that an argument of a command names."""
    try:
        with open(path, "rb") as file:
            return SecretKey.parse(file.read().decode())
    except OSError as error:
        raise ConfigError(f"cannot read {path!r}: {error.strerror}; name a file with a secret key") from None
    except (FormatError, UnicodeDecodeError):  # the parser's message may quote the file
        raise ConfigError(f"no secret key in {path!r}; make one with harmonia keygen") from None


def _secret_key(path: str, *key: str) -> SecretKey:
    """Return the key in the file `path`, which the setting `key` names."""
    with open_file(key, path, "name a file with a secret key") as file:
        try:
            return SecretKey.parse(file.read().decode())
        except (FormatError, UnicodeDecodeError):
            # The parser's message may quote the file, which may hold another secret.
            what = f"no secret key in {path!r}; make one with harmonia keygen"
            raise WrongSettingError(what, *key, key_file=path) from None


def load_tokens(settings: Settings) -> tuple[Token, ...]:
    """Return the valid tokens, or none without `tokens_path`."""
    if settings.tokens_path is None:
        return ()
    with open_file(
        "tokens_path", settings.tokens_path, "name a file with the lines that harmonia token prints"
    ) as file:
        try:
            return tokens.parse(file.read().decode())
        except UnicodeDecodeError:
            why = "not UTF-8"
        except FormatError as error:
            why = str(error)
    raise WrongSettingError(f"{settings.tokens_path!r}: {why}; harmonia token prints a valid line", "tokens_path")


class CertificateError(HarmoniaError):
    """Clients refuse the server's certificate. The message is OpenSSL's reason."""


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """Return the TLS context of the server, or None without TLS."""
    if settings.tls_cert_path is None or settings.tls_key_path is None:
        return None
    for key in ("tls_cert_path", "tls_key_path"):
        open_file(key, getattr(settings, key), "name a readable PEM file").close()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load_certificates(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), "tls_cert_path", settings.tls_cert_path)
    try:
        # Given a password, OpenSSL fails if the key needs one, instead of asking for one at the terminal.
        context.load_cert_chain(settings.tls_cert_path, settings.tls_key_path, password="")
    except ssl.SSLError as error:
        raise _wrong_pair(settings, error.reason or "") from None
    if settings.tls_client_ca_path is not None:
        open_file("tls_client_ca_path", settings.tls_client_ca_path, "name a readable PEM file").close()
        _load_certificates(context, "tls_client_ca_path", settings.tls_client_ca_path)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _wrong_pair(settings: Settings, reason: str) -> WrongSettingError:
    """Return an error that names the wrong one of the two files, given OpenSSL's reason.

    The reason is empty if OpenSSL cannot read a file.
    """
    cert, key = settings.tls_cert_path, settings.tls_key_path
    if reason in _NOT_A_PAIR:
        what = f"{key!r} is not the key of the first certificate in {cert!r}; give the two that belong together"
    elif reason.endswith(("TOO_SMALL", "TOO_WEAK")):
        why = reason.lower().replace("_", " ")
        return WrongSettingError(f"{cert!r} is too weak for OpenSSL: {why}; make a stronger one", "tls_cert_path")
    else:
        what = f"cannot read a private key in {key!r}; give one in PEM form, without a passphrase"
    return WrongSettingError(what, "tls_key_path")


def _load_certificates(context: ssl.SSLContext, key: str, path: str) -> None:
    """Make the context trust the certificates in the file `path`, the value of the setting `key`."""
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        what = f"no certificates in {path!r} ({error.reason or 'not PEM'}); give them as PEM"
        raise WrongSettingError(what, key) from None


def certificate_end(settings: Settings, context: ssl.SSLContext) -> float:
    """Return the end of the certificate served with `context`, in seconds since 1970.

    Raises CertificateError if clients that trust the issuer refuse the certificate, for example because it has expired.
    The host name is not checked.
    """
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the certificate itself is the trust anchor
    client.load_verify_locations(settings.tls_cert_path)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client_end = client.wrap_bio(to_client, to_server)
    server_end = context.wrap_bio(to_server, to_client, server_side=True)
    for end in (client_end, server_end, client_end):
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLError as error:
            raise CertificateError(str(getattr(error, "verify_message", error.reason))) from None
    return ssl.cert_time_to_seconds(str((client_end.getpeercert() or {})["notAfter"]))


def authorization(settings: Settings, number: int) -> str | None:
    """Return the value of Authorization for an upstream, or None without credentials for its host.

    `number` is the index of the upstream in `Settings.sources`.
    """
    upstream = settings.sources[number]
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
    """Return the value of Authorization for the content of a `credentials_file`: `user:password`, `:token` or `token:`.

    Raises FormatError if the content is malformed.
    """
    user, colon, password = content.rstrip(b"\r\n").partition(b":")
    if not colon or not (user or password) or re.search(rb"[\r\n]", user + password):
        raise FormatError("expected USER:PASSWORD or :TOKEN; give one such line")
    return netrc.basic(user, password)


def mirror_keys(settings: Settings) -> tuple[str, str] | None:
    """Return the access key ID and the secret access key for the mirror's bucket, or None without a file with them."""
    path = settings.mirror.credentials_file
    if path is None:
        return None
    with open_file(("mirror", "credentials_file"), path, "name a readable file") as file:
        access, _, secret = file.read(netrc.MAX_BYTES).decode(errors="replace").strip().partition(":")
    if not (re.fullmatch(r"[!-~]+", access) and re.fullmatch(r"[!-~]+", secret)):
        what = f"{path!r}: expected ACCESS_KEY_ID:SECRET_ACCESS_KEY; give one such line"
        raise WrongSettingError(what, "mirror", "credentials_file", key_file=path)
    return access, secret


def upstream_tls(settings: Settings, number: int) -> ssl.SSLContext:
    """Return the TLS context that verifies the certificate of an upstream, by its index in `Settings.sources`."""
    path = settings.sources[number].ca_file
    if path is None:
        return system_tls()
    try:
        return ssl.create_default_context(cafile=path)
    except OSError as error:
        what = error.reason if isinstance(error, ssl.SSLError) else error.strerror
        what = f"cannot read {path!r}: {what or 'not PEM'}; name a file with certificates in PEM form"
        raise WrongSettingError(what, "upstream", str(number), "ca_file") from None


@cache
def system_tls() -> ssl.SSLContext:
    """Return the TLS context that trusts the system's CA certificates.

    One for all upstreams and for all workers, which inherit it: to load the certificates takes 35 ms.
    """
    return ssl.create_default_context()


def client_tls(environ: Mapping[str, str]) -> ssl.SSLContext:
    """Return the TLS context of commands, which trusts the certificates in $NIX_SSL_CERT_FILE or those of the system.

    Raises ConfigError if the file cannot be read.
    """
    path = environ.get("NIX_SSL_CERT_FILE") or None
    try:
        return ssl.create_default_context(cafile=path)
    except OSError as error:
        why = "no certificates in PEM form" if isinstance(error, ssl.SSLError) else error.strerror
        remedy = "name a file with certificates, or unset it"
        raise ConfigError(f"environment variable NIX_SSL_CERT_FILE: cannot read {path!r}: {why}; {remedy}") from None


def open_file(key: str | tuple[str, ...], path: str, remedy: str) -> BinaryIO:
    """Open the file that the setting `key` names.

    Raises WrongSettingError with the remedy if that fails.
    """
    try:
        return open(path, "rb")
    except OSError as error:
        what = f"cannot read {path!r}: {error.strerror}; {remedy}"
        raise WrongSettingError(what, *((key,) if isinstance(key, str) else key), key_file=path) from None

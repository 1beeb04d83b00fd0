"""Check of the settings against this machine, for the start of the server and for `harmonia check-config`.

The check changes nothing, and does not disturb a running server with the same settings.
"""

import logging
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from harmonia.config import credentials, tokens
from harmonia.config.default_directories import default_cache_dir
from harmonia.config.loader import Source
from harmonia.config.optional_packages import require_all
from harmonia.config.proxy import ProxyRules
from harmonia.config.settings import Settings
from harmonia.config.value_types import HostAndPort
from harmonia.config.wrong_setting import WrongSettingError
from harmonia.errors import FormatError, StoreUnavailableError
from harmonia.process import sockets, systemd
from harmonia.store.store import Store

_log = logging.getLogger("harmonia")

# SQLite's errors for a file that is not a database of Nix. Other errors, such as a lock, may be temporary.
_NO_DATABASE = {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT}

# The index on `path` finds the prefix; "0" follows "/".
_SOME_PATH = """
select path, exists (select 1 from ValidPaths where path >= ? || '/' and path < ? || '0') from ValidPaths limit 1
"""


@contextmanager
def checked(source: Source) -> Iterator[Settings]:
    """Check the settings of a source against this machine, and log warnings.

    Raises ConfigError with the place of the setting, also for a WrongSettingError in the body of the `with` statement.
    """
    settings = source.settings()
    if why := source.ignored_log_level():
        _log.warning("environment variable RUST_LOG has no effect: %s; remove it, or use log_level alone", why)
    try:
        for doubt in check(settings, source.environ):
            _log.warning("%s", source.located(doubt))
        yield settings
    except WrongSettingError as error:
        raise source.located(error) from None


def load(path: str | None, environ: Mapping[str, str]) -> Settings:
    """Return the settings of the file that `Source.read` finds, checked against this machine.

    Raises ConfigError if a setting is wrong.
    """
    with checked(Source.read(path, environ)) as settings:
        return settings


def check(settings: Settings, environ: Mapping[str, str]) -> list[WrongSettingError]:
    """Return likely mistakes, for warnings.

    Raises WrongSettingError if a setting cannot work.
    """
    store = _store(settings) if settings.local_store else ()
    doubts = [*store, *_directories(settings, environ), *_secrets(settings, environ), *_tokens(settings)]
    _addresses(settings, environ)
    return doubts


def _store(settings: Settings) -> Iterator[WrongSettingError]:
    key = "real_nix_store" if settings.real_nix_store else "virtual_nix_store"
    try:
        os.stat(os.path.join(settings.real_store, "."))  # fails without permission to enter the directory
    except PermissionError as error:
        what = f"cannot enter {settings.real_store!r}: {error.strerror}; let the server's user read the store"
        raise WrongSettingError(what, key) from None
    except OSError as error:
        what = f"no store at {settings.real_store!r}: {error.strerror}; set real_nix_store to its path on disk"
        raise WrongSettingError(what, key) from None
    credentials.open_file("nix_db_path", settings.database, "set nix_db_path to the store's db.sqlite").close()
    store_dir = settings.virtual_nix_store
    database = Store.of(settings).database
    try:
        paths = list(database.query(_SOME_PATH, store_dir, store_dir))
        if not paths and not settings.asks_upstreams:
            what = f"{settings.database!r} has no valid paths, so nothing is served"
            yield WrongSettingError(
                f"{what}; to try Harmonia, use harmonia demo, or make demo in a clone", "nix_db_path"
            )
        for path, is_below in paths:
            if not is_below:
                what = f"no path of {settings.database!r} is in {store_dir!r}; they are in {os.path.dirname(path)!r}"
                yield WrongSettingError(f"{what}; set this to that directory", "virtual_nix_store")
    except StoreUnavailableError as error:
        cause = error.__cause__
        if getattr(cause, "sqlite_errorcode", 0) & 0xFF in _NO_DATABASE:
            what = f"{settings.database!r} is not a database of Nix: {cause}; name the store's db.sqlite"
            raise WrongSettingError(what, "nix_db_path") from None
        yield WrongSettingError(f"{error}; the store is not served until it is readable", "nix_db_path")
    finally:
        database.close()
    for root in settings.publish.gc_roots:
        if not root.startswith(f"{store_dir}/") and not os.path.lexists(root):
            what = f"{root!r} does not exist; name a store path, a symlink to one, or a directory with such symlinks"
            raise WrongSettingError(what, "publish", "gc_roots")


def _directories(settings: Settings, environ: Mapping[str, str]) -> Iterator[WrongSettingError]:
    if settings.log_dir is not None and not os.path.isdir(
        settings.log_dir
    ):  # Nix creates the default one with the first log
        yield WrongSettingError(f"{settings.log_dir!r} is not a directory; name the directory of Nix's logs", "log_dir")
    if settings.cache_dir is not None:
        path = Path(settings.cache_dir).absolute()
        existing = next(each for each in (path, *path.parents) if os.path.exists(each))
        if not existing.is_dir():
            what = f"{str(existing)!r} is not a directory; name a directory, which need not exist yet"
            wrong = WrongSettingError(what, "cache_dir")
            if settings.cache_dir != default_cache_dir(environ):
                raise wrong
            yield wrong  # only a warning for the default


def _secrets(settings: Settings, environ: Mapping[str, str]) -> Iterator[WrongSettingError]:
    credentials.secret_keys(settings)
    credentials.push_key(settings)
    credentials.mirror_keys(settings)
    require_all(settings)
    if tls := credentials.tls_context(settings):
        try:
            credentials.certificate_end(settings, tls)
        except credentials.CertificateError as error:
            what = f"clients will refuse {settings.tls_cert_path!r}: {error}; replace it"
            yield WrongSettingError(what, "tls_cert_path")
    files: dict[str | None, tuple[str, ...]] = dict.fromkeys(settings.sign_key_paths, ("sign_key_paths",))
    files[settings.tls_key_path] = ("tls_key_path",)
    files[settings.push.sign_key_path] = ("push", "sign_key_path")
    files[settings.mirror.credentials_file] = ("mirror", "credentials_file")
    for number, upstream in enumerate(settings.upstream):
        if credentials.authorization(settings, number) is None and upstream.netrc is not None:
            host = urlsplit(upstream.url).hostname
            what = f"no entry for {host} in {upstream.netrc!r}, so no password is sent"
            what += f"; add machine {host} login USER password PASSWORD"
            yield WrongSettingError(what, "upstream", str(number), "netrc")
        credentials.upstream_tls(settings, number)
        try:
            ProxyRules(environ, upstream.proxy).proxy_for(upstream.url)
        except FormatError as error:
            raise WrongSettingError(f'{error}, or set proxy = "" here', "upstream", str(number), "proxy") from None
        files |= {getattr(upstream, key): ("upstream", str(number), key) for key in ("netrc", "credentials_file")}
    # systemd gives credentials the mode 0440 and guards their directory instead (systemd issue 29435).
    guarded = os.path.join(os.path.realpath(environ.get("CREDENTIALS_DIRECTORY") or "/nonexistent"), "")
    for path, key in files.items():
        if path is None or os.path.realpath(path).startswith(guarded):
            continue
        if (mode := os.stat(path).st_mode & 0o777) & 0o077:
            what = f"others than the owner can access the key file {path!r} (mode {mode:04o}); chmod 600 it"
            yield WrongSettingError(what, *key, key_file=path)


def _tokens(settings: Settings) -> Iterator[WrongSettingError]:
    now = time.time()
    for token in credentials.load_tokens(settings):
        if problem := tokens.expiry_problem(token, now):
            what = f"{problem}; replace its line in {settings.tokens_path!r} with one of harmonia token {token.name}"
            yield WrongSettingError(what, "tokens_path")


def _addresses(settings: Settings, environ: Mapping[str, str]) -> None:
    if not systemd.has_sockets(environ):
        sockets.check(settings, "bind")
        if _overlap(settings.address("bind"), settings.address("metrics_bind")):
            what = f"{settings.metrics_bind} overlaps with bind = {settings.bind!r}; choose another address"
            raise WrongSettingError(what, "metrics_bind")
    sockets.check(settings, "metrics_bind")


def _overlap(one: HostAndPort | str | None, other: HostAndPort | str | None) -> bool:
    """Return True if the addresses exclude each other, as far as their names show it."""
    if not isinstance(one, tuple) or not isinstance(other, tuple):
        return one == other
    hosts = {one[0], other[0]}
    any_v4 = "0.0.0.0" in hosts and not any(":" in host for host in hosts)  # noqa: S104 (a comparison, not a bind)
    return one[1] == other[1] != 0 and (len(hosts) == 1 or "::" in hosts or any_v4)

"""The settings: one frozen value, read once from one TOML file, with the keys and meanings of upstream Harmonia 3.

`parse` is pure, `check` looks at the disk, `load` does both. What contradicts itself cannot be built: `Settings` and
`Zstd` check their own relations. The reference in docs/configuration.md is rendered from the descriptions below.
"""

import base64
import difflib
import ipaddress
import logging
import netrc
import os
import re
import reprlib
import ssl
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, BinaryIO, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from harmonia import access
from harmonia.access import Scope, Token
from harmonia.errors import ConfigError, FormatError
from harmonia.nix.signing import PublicKey, SecretKey

log = logging.getLogger("harmonia")

_DATABASE = "var/nix/db/db.sqlite"  # beside the store directory, in Nix's own layout
_LOGS = "../../log/nix"  # from the directory of the database, likewise
_UNIX_PATH_MAX = 107  # unix(7): sun_path has 108 bytes, one of them the final NUL
_PORT_MAX = 65535
_WINDOW_LOG_MIN, _WINDOW_LOG_MAX = 10, 27  # libzstd's least; the most that decoders take unless told otherwise
_WINDOW_LOG = f"0, or an integer from {_WINDOW_LOG_MIN} to {_WINDOW_LOG_MAX}"
_BIND = '"host:port", "[IPv6]:port" or "unix:/path"'
_MODE = 'a string of three or four octal digits, like "0660"'
_SIZE = 'a string like "500M" or "20G": K, M, G, T for KiB to TiB'
_PROXIES = 'an array of IP addresses, networks like "10.0.0.0/8", or "unix"'
# Nothing, control characters, or a key pasted in the place of its file's path: that must not reach any message.
_NO_PATH = re.compile(r"\A\Z|[\x00-\x1f\x7f]|\A[^/]*:[A-Za-z0-9+/=]{40}")
_URL = 'a string like "https://cache.example.org" or "https://example.org/nix"'
_HOST = r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
BASE_URL = re.compile(rf"\Ahttps?://{_HOST}(?:/[A-Za-z0-9._~%-]+)*/?\Z")
"""What can stand unquoted in a shell, in a Nix string and in nix.conf, where people copy it to."""
_SCOPES = ", ".join(f'"{scope}"' for scope in access.SCOPES)
_FILES = ("tls_cert_path", "tls_key_path", "tls_client_ca_path", "tokens_path")
_NEEDS = (
    ("tls_cert_path", "tls_key_path", "TLS needs both, set both or none"),
    ("tls_key_path", "tls_cert_path", "TLS needs both, set both or none"),
    ("tls_client_ca_path", "tls_cert_path", "only TLS knows client certificates, set both or none"),
    ("anonymous_scopes", "tokens_path", "nobody needs a token then; remove this, or set both"),
)
_NO_EFFECT = {"daemon_socket", "max_connection_rate"}

Count = Annotated[int, Meta(ge=0)]
Address = Annotated[str, Meta(extra={"wanted": _BIND})]
Mode = Annotated[str, Meta(pattern=r"\A[0-7]{3,4}\Z", extra={"wanted": _MODE})]
Size = Annotated[str, Meta(pattern=r"\A[0-9]{1,6}[KMGT]\Z", extra={"wanted": _SIZE})]
AbsolutePath = Annotated[str, Meta(extra={"wanted": "an absolute path"})]
WindowLog = Annotated[int, Meta(ge=0, le=_WINDOW_LOG_MAX, extra={"wanted": _WINDOW_LOG})]
Url = Annotated[str, Meta(pattern=BASE_URL.pattern, extra={"wanted": _URL})]
Seconds = Annotated[float, Meta(gt=0, le=3600)]
BaseUrl = Annotated[str, Meta(pattern=BASE_URL.pattern, extra={"wanted": _URL})]
Proxies = Annotated[tuple[str, ...], Meta(extra={"wanted": _PROXIES})]
Level = Literal["debug", "info", "warning", "error"]


class _WrongSettingError(ConfigError):
    """What is wrong with one key; `_placed` puts before it where the value came from."""

    def __init__(self, what: str, *key: str, key_file: str | None = None) -> None:
        name = ".".join(part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else repr(part) for part in key)
        super().__init__(f"{name}: {what}")
        self.key = key
        self.key_file = key_file


class Zstd(msgspec.Struct, frozen=True, kw_only=True):
    level: Annotated[
        int, Meta(ge=-7, le=22, description="Higher is smaller and slower; 0 is libzstd's own default (3).")
    ] = 3
    long_distance_matching: Annotated[
        bool, Meta(description="Find repetitions that lie far apart, at four times the memory.")
    ] = False
    window_log: Annotated[
        WindowLog,
        Meta(
            description="log2 of the match window in bytes; 0 is what the level brings, and 25 (32 MiB) with"
            " `long_distance_matching`. NARs are compressed in pieces of that size, but at least 8 MiB."
        ),
    ] = 0
    max_ldm_encoders_per_worker: Annotated[
        Count, Meta(description="Threads that compress with `long_distance_matching`; 0 is one for each CPU.")
    ] = 16

    def __post_init__(self) -> None:
        if 0 < self.window_log < _WINDOW_LOG_MIN:
            raise _WrongSettingError(f"expected {_WINDOW_LOG}, found integer {self.window_log}", "zstd", "window_log")


class Upstream(msgspec.Struct, frozen=True, kw_only=True):
    """Another cache, asked for what is not in the store."""

    url: Annotated[Url, Meta(description="Its URL, as clients would have it among their substituters.")]
    public_keys: Annotated[
        tuple[str, ...],
        Meta(description="Keys like `name:base64`. What none of them signed is not passed on; with `[]`, all is."),
    ] = ()
    mode: Annotated[
        Literal["proxy", "redirect"],
        Meta(description="Whether NARs come through this server, and are kept in its cache, or straight from there."),
    ] = "proxy"
    priority: Annotated[
        int, Meta(ge=0, le=2**31 - 1, description="The lowest is asked first; equal ones are asked at once.")
    ] = 50
    sign: Annotated[
        bool, Meta(description="Sign with our keys, too, what one of its `public_keys` signed. Needs those.")
    ] = False
    connect_timeout: Annotated[Seconds, Meta(description="How long a connection to it may take to come about.")] = 2.0
    timeout: Annotated[
        Seconds, Meta(description="How long an answer may take, and each pause in one, before the upstream has failed.")
    ] = 10.0
    netrc: Annotated[str | None, Meta(description="A netrc(5) file with the user and password for its host.")] = None
    credentials_file: Annotated[
        str | None, Meta(description="A file with `user:password` for it, in place of `netrc`.")
    ] = None
    ca_file: Annotated[
        str | None,
        Meta(
            extra={"default": "the system's"}, description="Certificates in PEM form, one of which must vouch for it."
        ),
    ] = None


class Release(msgspec.Struct, frozen=True, kw_only=True):
    """What may leave the house. Where nothing is given, all that is valid may."""

    signed_by: Annotated[
        tuple[str, ...],
        Meta(description="Public keys like `name:base64`: only paths that are stored with a signature of one of them."),
    ] = ()
    allow: Annotated[
        tuple[str, ...], Meta(description='Patterns like "hello-*": only paths with a name that one of them matches.')
    ] = ()
    deny: Annotated[tuple[str, ...], Meta(description="Patterns: no path with a name that one of them matches.")] = ()
    gc_roots: Annotated[
        tuple[str, ...],
        Meta(description="Store paths, symlinks to them, directories of such: only those and what they need."),
    ] = ()

    def __post_init__(self) -> None:
        for text in self.signed_by:
            try:
                PublicKey.parse(text)
            except FormatError as error:
                raise _WrongSettingError(f"{error}, as in nix.conf", "release", "signed_by") from None
        for path in self.gc_roots:
            if not os.path.isabs(path):
                what = f"expected absolute paths, found {reprlib.repr(path)}"
                raise _WrongSettingError(what, "release", "gc_roots")

    @property
    def public_keys(self) -> tuple[PublicKey, ...]:
        return tuple(map(PublicKey.parse, self.signed_by))


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    bind: Annotated[
        Address, Meta(description="Where to listen; port 0 takes a free one. Sockets from systemd take its place.")
    ] = "[::]:5000"
    unix_socket_mode: Annotated[Mode, Meta(description="Permissions of the unix socket.")] = "0666"
    workers: Annotated[
        int,
        Meta(ge=1, le=1024, extra={"default": "`4`, or the CPUs if fewer"}, description="Processes that serve."),
    ] = msgspec.field(default_factory=lambda: min(4, len(os.sched_getaffinity(0))))
    max_connections: Annotated[
        Count, Meta(description="Connections that each worker has open at once; 0 is no limit.")
    ] = 2048
    max_connection_rate: Annotated[
        Count, Meta(description="No effect (upstream: TLS handshakes at once). Accepted with a warning.")
    ] = 256
    max_header_size: Annotated[
        int, Meta(ge=1024, le=16384, description="Bytes that the head of a request may have.")
    ] = 8192
    header_timeout: Annotated[
        int, Meta(ge=1, le=3600, description="Seconds for which the head of a request may be on its way.")
    ] = 30
    keep_alive_timeout: Annotated[
        int, Meta(ge=1, le=86400, description="Seconds for which a connection may be idle between two requests.")
    ] = 120
    max_query_rate: Annotated[
        Count,
        Meta(
            description="Searches, pages of paths and questions for debug info that each worker answers to one client"
            " address in a minute; beyond it 429. 0 is no limit."
        ),
    ] = 1200
    max_failed_auth_rate: Annotated[
        Count,
        Meta(
            description="Wrong tokens from one client address in a minute that each worker answers with 401; beyond it"
            " 429. 0 is no limit. Right tokens are always let in."
        ),
    ] = 120
    shutdown_grace: Annotated[
        Count, Meta(description="Seconds that running downloads get when the server is told to stop.")
    ] = 30
    tls_cert_path: Annotated[
        str | None, Meta(description="Certificate chain in PEM form, to serve HTTPS. Needs `tls_key_path`.")
    ] = None
    tls_key_path: Annotated[
        str | None, Meta(description="The certificate's private key in PEM form, without a passphrase.")
    ] = None
    tls_client_ca_path: Annotated[
        str | None,
        Meta(description="Certificates in PEM form, one of which must vouch for each client's own."),
    ] = None
    tokens_path: Annotated[
        str | None,
        Meta(description="File with hashes of tokens: only who has one gets in. `harmonia token` makes them."),
    ] = None
    anonymous_scopes: Annotated[
        tuple[Scope, ...],
        Meta(extra={"wanted": f"an array of {_SCOPES}"}, description="What needs no token. Needs `tokens_path`."),
    ] = ()
    virtual_nix_store: Annotated[
        AbsolutePath, Meta(description="The store directory that clients are told, in every store path.")
    ] = "/nix/store"
    real_nix_store: Annotated[
        str | None,
        Meta(extra={"default": "`virtual_nix_store`"}, description="Where it lies on disk. May be a symlink."),
    ] = None
    nix_db_path: Annotated[
        str | None,
        Meta(extra={"default": f"`../{_DATABASE}` from the store on disk"}, description="Nix's SQLite database."),
    ] = None
    log_dir: Annotated[
        str | None,
        Meta(extra={"default": f"`{_LOGS}` from the database's directory"}, description="Where Nix keeps build logs."),
    ] = None
    daemon_socket: Annotated[
        str | None, Meta(description="No effect (upstream 3.0: the Nix daemon's socket). Accepted with a warning.")
    ] = None
    sign_key_paths: Annotated[
        tuple[str, ...], Meta(description="Files with secret keys: each narinfo is signed with each of them.")
    ] = ()
    sign_key_path: Annotated[
        str | None, Meta(description="Deprecated: one more of `sign_key_paths`. Accepted with a warning.")
    ] = None
    priority: Annotated[
        int, Meta(ge=0, le=2**31 - 1, description="Told in `/nix-cache-info`: clients ask the lowest cache first.")
    ] = 30
    narinfo_max_age: Annotated[
        int, Meta(ge=0, le=2**31, description="Seconds for which HTTP caches may keep a narinfo.")
    ] = 86400
    enable_compression: Annotated[
        bool, Meta(description="Compress with zstd: for clients that accept it, and as `nar_compression` says.")
    ] = True
    nar_compression: Annotated[
        Literal["auto", "zstd", "none"],
        Meta(
            description="What narinfos offer: `zstd` files, which can be resumed, or plain NARs. `auto` is `zstd` where"
            " the cache directory can be written."
        ),
    ] = "auto"
    cache_dir: Annotated[
        str | None,
        Meta(
            extra={"default": "`$CACHE_DIRECTORY`, `$XDG_CACHE_HOME/harmonia` or `~/.cache/harmonia`"},
            description="Where compressed NARs and the index of debug info are kept.",
        ),
    ] = None
    cache_size: Annotated[
        Size | None,
        Meta(
            extra={"default": "half of the free space, at most `20G`"},
            description="How much they may take. The longest unused go first.",
        ),
    ] = None
    debug_info: Annotated[
        bool, Meta(description="Tell at `/debuginfo` where debug info is. Each path in the store is looked at once.")
    ] = True
    trusted_proxies: Annotated[
        Proxies, Meta(description="Peers whose `X-Forwarded-…` are believed; `unix` is every peer on a unix socket.")
    ] = ()
    base_url: Annotated[
        BaseUrl | None,
        Meta(extra={"default": "as the request tells"}, description="The URL of this cache that people are shown."),
    ] = None
    landing: Annotated[bool, Meta(description="Serve a page at `/` that tells people how to use this cache.")] = True
    browse: Annotated[
        bool, Meta(description="Let people search the store, and see which paths there are. Not for private stores.")
    ] = False
    metrics: Annotated[bool, Meta(description="Tell Prometheus at `/metrics` what the server does.")] = True
    metrics_bind: Annotated[
        Address | None,
        Meta(
            extra={"wanted": _BIND},
            description="Where to listen for `/metrics` alone, without TLS, in place of among everything else.",
        ),
    ] = None
    access_log: Annotated[bool, Meta(description="Log one line for each request.")] = False
    log_level: Annotated[Level, Meta(description="The least severe messages that are logged.")] = "info"
    upstream_timeout: Annotated[
        Seconds,
        Meta(description="How long a client waits at most to hear that no `[[upstream]]` has a path either."),
    ] = 1.0
    zstd: Annotated[Zstd, Meta(description="How to compress.")] = Zstd()
    upstream: Annotated[
        tuple[Upstream, ...], Meta(description="Other caches, each asked for what is not in the store.")
    ] = ()
    release: Annotated[Release, Meta(description="What may leave the house.")] = Release()

    def __post_init__(self) -> None:
        keys = ("virtual_nix_store", "real_nix_store", "nix_db_path", "log_dir", "cache_dir")
        paths = [(key, getattr(self, key)) for key in (*keys, *_FILES)]
        paths += [("sign_key_paths", path) for path in self.sign_key_paths]
        for key, path in paths:
            if path is not None and _NO_PATH.search(path):
                raise _WrongSettingError("expected a path, found something else (not shown)", key, key_file=path)
        if not os.path.isabs(self.virtual_nix_store):
            what = f"expected an absolute path, found {self.virtual_nix_store!r}"
            raise _WrongSettingError(what, "virtual_nix_store")
        for given, needed, remedy in _NEEDS:
            if getattr(self, given) and getattr(self, needed) is None:
                raise _WrongSettingError(f"set without {needed}; {remedy}", given)
        if self.address("metrics_bind") and not self.metrics:
            raise _WrongSettingError("set without metrics; remove this or set metrics = true", "metrics_bind")
        if isinstance(self.address("bind"), str) and self.tls_cert_path is not None:
            raise _WrongSettingError("no TLS over a unix socket; bind to host:port or remove this", "tls_cert_path")
        for peer in self.trusted_proxies:
            try:
                peer == "unix" or ipaddress.ip_network(peer)
            except ValueError as error:
                raise _WrongSettingError(f"expected {_PROXIES}: {error}", "trusted_proxies") from None
        _check_upstreams(self.upstream, self.release)

    def address(self, key: Literal["bind", "metrics_bind"]) -> tuple[str, int] | str | None:
        """That setting taken apart: host and port, or the path of a unix socket."""
        bind = getattr(self, key)
        if bind is None:
            return None
        if bind.startswith("unix:"):
            path = re.sub(r"\A//(?=/)", "", bind.removeprefix("unix:"))
            if path and not re.match(r"//[^/]", path) and "\0" not in path and len(os.fsencode(path)) <= _UNIX_PATH_MAX:
                return path
        elif match := re.fullmatch(r"(?:\[([^]]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})", bind):
            v6, host, port = match.groups()
            try:
                if int(port) <= _PORT_MAX:
                    return str(ipaddress.IPv6Address(v6)) if v6 else host, int(port)
            except ValueError:
                pass  # not an IPv6 address: told below
        limits = f"ports to {_PORT_MAX}, socket paths to {_UNIX_PATH_MAX} bytes"
        raise _WrongSettingError(f"expected {_BIND} ({limits}), found {reprlib.repr(bind)}", key)

    @property
    def cache_bytes(self) -> int | None:
        """`cache_size` as a number."""
        return int(self.cache_size[:-1]) << 10 * (1 + "KMGT".index(self.cache_size[-1])) if self.cache_size else None

    @property
    def real_store(self) -> str:
        """The directory that store objects are read from, without symlinks."""
        return os.path.realpath(self.real_nix_store or self.virtual_nix_store)

    @property
    def database(self) -> str:
        """Nix's database: beside the store as it is named, else, where that is a symlink, beside what it points to."""
        named = os.path.abspath(self.real_nix_store or self.virtual_nix_store)
        beside = [os.path.join(os.path.dirname(store), _DATABASE) for store in (named, self.real_store)]
        return self.nix_db_path or next(filter(os.path.exists, beside), beside[0])

    @property
    def logs(self) -> str:
        """The directory of the build logs."""
        return self.log_dir or os.path.normpath(os.path.join(os.path.dirname(self.database), _LOGS))


def load(path: str | None, environ: Mapping[str, str]) -> Settings:
    """The settings of the file at `path`, else at `$CONFIG_FILE`, else the defaults: checked against this machine."""
    name, text = _file(path, environ)
    settings = parse(text, name, environ)
    with _placed(text, name, environ):
        check(settings, environ)
    return settings


def read(path: str | None, environ: Mapping[str, str]) -> Settings:
    """The same, not checked: for those who only want to know where things are, and for settings of another machine."""
    name, text = _file(path, environ)
    return parse(text, name, environ)


def origins(path: str | None, environ: Mapping[str, str]) -> dict[str, str]:
    """Where each key's value comes from: `file:line`, the environment, or `default`. Keys are like `zstd.level`, and in
    an array of tables like `upstream.0.url`, where they are given.
    """
    name, text = _file(path, environ)
    given = tomllib.loads(text)
    keys: list[tuple[str, ...]] = [(field.name,) for field in msgspec.structs.fields(Settings)]
    keys += [("zstd", field.name) for field in msgspec.structs.fields(Zstd)]
    for key, values in given.items():
        tables = [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []
        keys += [(key, str(number), each) for number, table in enumerate(tables) for each in table]
    lines = {".".join(key): _line(text, key) for key in keys}
    places = {key: f"{name}:{line}" if line else "default" for key, line in lines.items()}
    variables = {"virtual_nix_store": ["NIX_STORE_DIR"], "log_dir": ["NIX_LOG_DIR"]}
    if "cache_dir" not in given:
        variables["cache_dir"] = ["CACHE_DIRECTORY", "XDG_CACHE_HOME", "HOME"]
    for key, names in variables.items():
        if variable := next(filter(environ.get, names), None):
            places[key] = f"environment variable {variable}"
    if named := dict.fromkeys(_key_files(given, environ).values()):
        places["sign_key_paths"] = ", ".join(
            f"environment variable {key[1:]}" if key.startswith("$") else places[key] for key in named
        )
    return places


def _file(path: str | None, environ: Mapping[str, str]) -> tuple[str, str]:
    """The name and the content of the file with the settings; of the defaults, where there is none."""
    name, text = path or environ.get("CONFIG_FILE"), ""
    if name:
        try:
            with open(name, "rb") as file:
                text = file.read().decode()
        except OSError as error:
            origin = "--config" if path else "environment variable CONFIG_FILE"
            raise ConfigError(f"{origin}: cannot read {name!r}: {error.strerror}; name a readable TOML file") from None
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise ConfigError(f"{name}:{line}: not UTF-8, as TOML must be; save the file in that encoding") from None
    return name or "built-in defaults", text


def parse(text: str, name: str, environ: Mapping[str, str]) -> Settings:
    """The settings that `text`, the content of the file `name`, and the environment give. The disk is not looked at."""
    try:
        given = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        at = re.search(r"\(at (?:line (\d+), column \d+|end of document)\)\Z", str(error))
        last = text.rstrip().count("\n") + 1
        place = f"{name}:{at[1] or last}" if at else name
        raise ConfigError(f"{place}: not valid TOML: {error}") from None
    with _placed(text, name, environ):
        values = _values(Settings, given)
        values["sign_key_paths"] = tuple(_key_files(values, environ))
        for key in sorted(values.keys() & _NO_EFFECT):
            log.warning("%s: %s has no effect in this Harmonia; it can be removed", name, key)
        if values.pop("sign_key_path", None) is not None:
            log.warning("%s: sign_key_path is deprecated; use sign_key_paths", name)
        if environ.get("SIGN_KEY_PATH"):
            log.warning("environment variable SIGN_KEY_PATH is deprecated; use SIGN_KEY_PATHS")
        values.setdefault("cache_dir", _cache_dir(environ))
        if store := environ.get("NIX_STORE_DIR") or values.get("virtual_nix_store"):
            values["virtual_nix_store"] = os.path.normpath(store)  # a final slash would be doubled in store paths
        if log_dir := environ.get("NIX_LOG_DIR"):
            values["log_dir"] = log_dir
        return Settings(**values)


def _cache_dir(environ: Mapping[str, str]) -> str:
    """The one that systemd made (of several, separated by colons, the first), else the user's."""
    home = environ.get("XDG_CACHE_HOME") or os.path.join(environ.get("HOME") or "/nonexistent", ".cache")
    return environ.get("CACHE_DIRECTORY", "").split(":")[0] or os.path.join(home, "harmonia")


def check(settings: Settings, environ: Mapping[str, str]) -> None:
    """Whether the store, its database and the key files are there and work; warns of key files that others may read."""
    key = "real_nix_store" if settings.real_nix_store else "virtual_nix_store"
    try:
        os.stat(os.path.join(settings.real_store, ""))
    except OSError as error:
        what = f"no store at {settings.real_store!r}: {error.strerror}; set real_nix_store to where it lies on disk"
        raise _WrongSettingError(what, key) from None
    _open("nix_db_path", settings.database, "set nix_db_path to the store's db.sqlite").close()
    secret_keys(settings)
    tls_context(settings)
    tokens(settings)
    for number in range(len(settings.upstream)):
        authorization(settings, number)
        upstream_tls(settings, number)
    for root in settings.release.gc_roots:
        if not root.startswith(f"{settings.virtual_nix_store}/") and not os.path.lexists(root):
            what = f"there is no {root!r}; name a store path, a symlink to one, or a directory of such"
            raise _WrongSettingError(what, "release", "gc_roots")
    secrets = [path for each in settings.upstream for path in (each.netrc, each.credentials_file)]
    for path in (*settings.sign_key_paths, *filter(None, [settings.tls_key_path, *secrets])):
        mode = os.stat(path).st_mode & 0o777
        # systemd gives credentials the mode 0440 and guards their directory instead (systemd issue 29435).
        directory = environ.get("CREDENTIALS_DIRECTORY")
        guarded = directory and os.path.realpath(path).startswith(os.path.join(os.path.realpath(directory), ""))
        if mode & 0o077 and not guarded:
            log.warning("key file %r is open to others than its owner (mode %04o); chmod 600 it", path, mode)


def secret_keys(settings: Settings) -> tuple[SecretKey, ...]:
    """The keys to sign with, in the order of their files."""
    keys = []
    for path in settings.sign_key_paths:
        with _open("sign_key_paths", path, "name a file with a secret key") as file:
            try:
                keys.append(SecretKey.parse(file.read().decode()))
            except (FormatError, UnicodeDecodeError):
                # The parser's own words may quote the file, which may hold some other secret.
                what = f"no secret key in {path!r}; make one with nix-store --generate-binary-cache-key"
                raise _WrongSettingError(what, "sign_key_paths", key_file=path) from None
    return tuple(keys)


def tokens(settings: Settings) -> tuple[Token, ...]:
    """Those that are let in, read anew from their file."""
    if settings.tokens_path is None:
        return ()
    with _open("tokens_path", settings.tokens_path, "name a file with the lines that harmonia token tells") as file:
        try:
            return access.parse(file.read().decode())
        except UnicodeDecodeError:
            what = "is not UTF-8"
        except FormatError as error:
            what = f"is not right: {error}"
    raise _WrongSettingError(f"{settings.tokens_path!r} {what}; harmonia token tells how a line looks", "tokens_path")


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """What TLS is served with, read anew from its two files; None without TLS."""
    if settings.tls_cert_path is None or settings.tls_key_path is None:
        return None
    for key in ("tls_cert_path", "tls_key_path"):
        _open(key, getattr(settings, key), "name a readable PEM file").close()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # With a password given, a key that needs one fails here instead of asking at the terminal.
        context.load_cert_chain(settings.tls_cert_path, settings.tls_key_path, password="")
    except ssl.SSLError as error:
        what = (
            f"{settings.tls_cert_path!r} and tls_key_path {settings.tls_key_path!r} do not work together "
            f"({error.reason or 'not PEM'}); give a PEM certificate chain and its key without a passphrase"
        )
        raise _WrongSettingError(what, "tls_cert_path") from None
    if settings.tls_client_ca_path is not None:
        _open("tls_client_ca_path", settings.tls_client_ca_path, "name a readable PEM file").close()
        try:
            context.load_verify_locations(settings.tls_client_ca_path)
        except ssl.SSLError as error:
            what = f"no certificates in {settings.tls_client_ca_path!r} ({error.reason or 'not PEM'}); give them as PEM"
            raise _WrongSettingError(what, "tls_client_ca_path") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


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
            raise _WrongSettingError(f"cannot read {path!r}: {what}; name a readable file", *key_path) from None
        if not user or not password or "\n" in user + password:
            raise _WrongSettingError(f"no user and password for this upstream in {path!r}", *key_path)
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
        raise _WrongSettingError(what, "upstream", str(number), "ca_file") from None


def _check_upstreams(upstreams: tuple[Upstream, ...], release: Release) -> None:
    if upstreams and release != Release():
        raise _WrongSettingError(
            "it does not hold for what comes from an [[upstream]]; give one or the other", "release"
        )
    urls = [upstream.url.rstrip("/") for upstream in upstreams]
    for number, upstream in enumerate(upstreams):
        if (wrong := _contradiction(upstream)) is None and urls.index(urls[number]) != number:
            wrong = "url", "given twice; keep one of them"
        if wrong is not None:
            key, what = wrong
            raise _WrongSettingError(what, "upstream", str(number), key)


def _contradiction(upstream: Upstream) -> tuple[str, str] | None:
    """The key that cannot be as it is, and why."""
    for key in ("netrc", "credentials_file", "ca_file"):
        path = getattr(upstream, key)
        if path is not None and _NO_PATH.search(path):
            return key, "expected a path, found something else (not shown)"
    for text in upstream.public_keys:
        try:
            PublicKey.parse(text)
        except FormatError as error:
            return "public_keys", f"{error}, as in nix.conf"
    if upstream.sign and not upstream.public_keys:
        return "sign", "set without public_keys; only what they signed is signed again, so give them or remove this"
    if upstream.netrc is not None and upstream.credentials_file is not None:
        return "credentials_file", "set together with netrc; keep one of them"
    return None


def wanted(kind: object) -> str:
    """What a field of this type takes, in the words of error messages and of the reference."""
    schema = msgspec.inspect.type_info(kind)
    while isinstance(schema, msgspec.inspect.Metadata):
        if schema.extra and "wanted" in schema.extra:
            return str(schema.extra["wanted"])
        schema = schema.type
    match schema:
        case msgspec.inspect.IntType(ge=low, le=high):
            return f"an integer, {low} or more" if high is None else f"an integer from {low} to {high}"
        case msgspec.inspect.FloatType(le=high):
            return f"seconds, more than 0 and at most {high}"
        case msgspec.inspect.LiteralType(values=words):
            return "one of " + ", ".join(f'"{word}"' for word in words)
    names: dict[type, str] = {
        msgspec.inspect.BoolType: "true or false",
        msgspec.inspect.VarTupleType: "an array of " + ("tables" if _is_of_tables(schema) else "strings"),
        msgspec.inspect.StructType: "a table",
    }
    return names.get(type(schema), "a string")


def _is_of_tables(schema: object) -> bool:
    return isinstance(schema, msgspec.inspect.VarTupleType) and isinstance(schema.item_type, msgspec.inspect.StructType)


def _values(
    struct: type[Settings | Zstd | Release | Upstream], given: Mapping[str, Any], *table: str
) -> dict[str, Any]:
    """The arguments for `struct` that a TOML table gives: only known keys, each of its type and in its range."""
    types = {field.name: field.type for field in msgspec.structs.fields(struct)}
    values = {}
    for key, value in given.items():
        if key not in types:
            near = difflib.get_close_matches(key, _KEYS, 1)
            remedy = f"did you mean {_KEYS[near[0]]}?" if near else "remove it; docs/configuration.md lists all keys"
            raise _WrongSettingError(f"unknown key; {remedy}", *table, key)
        part = value
        if key in _TABLES and isinstance(value, dict):
            part = _TABLES[key](**_values(_TABLES[key], value, key))
        elif key == "upstream" and isinstance(value, list) and all(isinstance(each, dict) for each in value):
            part = tuple(_upstream(each, str(number)) for number, each in enumerate(value))
        try:
            values[key] = msgspec.convert(part, types[key])
        except msgspec.ValidationError:
            # A secret key in the place of its file's path must not be shown.
            secret = "_path" in key or key in {"netrc", "credentials_file", "signed_by", "url"}  # a URL may hold one
            shown = "(not shown)" if secret else reprlib.repr(value)
            found = f"{_TOML_TYPES.get(type(value), 'date or time')} {shown}"
            raise _WrongSettingError(f"expected {wanted(types[key])}, found {found}", *table, key) from None
    return values


def _upstream(given: Mapping[str, Any], number: str) -> Upstream:
    values = _values(Upstream, given, "upstream", number)
    if "url" not in values:
        raise _WrongSettingError("missing; each [[upstream]] needs the URL of a cache", "upstream", number, "url")
    return Upstream(**values)


_TABLES: dict[str, type[Zstd | Release]] = {"zstd": Zstd, "release": Release}
_KEYS = {field.name: field.name for field in msgspec.structs.fields(Settings)}
_KEYS |= {
    field.name: f"{name}.{field.name}" for name, part in _TABLES.items() for field in msgspec.structs.fields(part)
}
_KEYS = {field.name: f"upstream.{field.name}" for field in msgspec.structs.fields(Upstream)} | _KEYS
_TOML_TYPES = {str: "string", int: "integer", float: "float", bool: "boolean", list: "array", dict: "table"}


def _key_files(given: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, str]:
    """Each key file once, and what named it. The order is upstream's, for clients see the signatures in it."""
    named = [(path, "sign_key_paths") for path in given.get("sign_key_paths", ())]
    named += [(path, "sign_key_path") for path in [given.get("sign_key_path")] if path is not None]
    named += [(path, "$SIGN_KEY_PATH") for path in [environ.get("SIGN_KEY_PATH")] if path]
    named += [(path, "$SIGN_KEY_PATHS") for path in environ.get("SIGN_KEY_PATHS", "").split()]
    return dict(named)


def _open(key: str, path: str, remedy: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        what = f"cannot read {path!r}: {error.strerror}; {remedy}"
        raise _WrongSettingError(what, key, key_file=path) from None


@contextmanager
def _placed(text: str, name: str, environ: Mapping[str, str]) -> Iterator[None]:
    """Tell where a wrong setting was made: the environment variable, or the file and its line."""
    try:
        yield
    except _WrongSettingError as error:
        given, key = tomllib.loads(text), error.key
        if key == ("sign_key_paths",) and error.key_file is not None:
            key = (_key_files(given, environ)[error.key_file],)
        elif key == ("virtual_nix_store",) and environ.get("NIX_STORE_DIR"):
            key = ("$NIX_STORE_DIR",)
        elif key == ("log_dir",) and environ.get("NIX_LOG_DIR"):
            key = ("$NIX_LOG_DIR",)
        if key[0].startswith("$"):
            place = f"environment variable {key[0][1:]}"
        else:
            line = _line(text, key)
            place = f"{name}:{line}" if line else name
        raise ConfigError(f"{place}: {error}") from None


def _line(text: str, key: tuple[str, ...]) -> int | None:
    """The line where the statement starts that first gives `key`. tomllib tells no lines, but it can be asked: whole
    statements are what parses, and the first run of them that has the key ends with the one sought.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    start = 1
    for count in range(1, len(lines) + 1):
        try:
            table: Any = tomllib.loads("\n".join(lines[:count]))
        except (ValueError, RecursionError):
            continue  # amid an array or string of several lines
        for part in key:
            if isinstance(table, list):
                table = table[int(part)] if int(part) < len(table) else None
            else:
                table = table.get(part) if isinstance(table, dict) else None
        if table is not None:
            return start
        start = count + 1
    return None

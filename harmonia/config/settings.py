"""The settings: one frozen value, with the keys and meanings of upstream Harmonia 3.

What contradicts itself cannot be built: the tables check their own relations. Their values are told in kinds.py,
how they come from a file in config.py. The tables in docs/reference/configuration.md are made from the descriptions
below.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from harmonia.config import amounts, value_types
from harmonia.config.proxy import Proxy
from harmonia.config.value_types import (
    AbsolutePath,
    Address,
    Bytes,
    Count,
    File,
    Level,
    Mode,
    Proxies,
    Scopes,
    Seconds,
    Size,
    Url,
    WholeSeconds,
    WindowLog,
)
from harmonia.errors import ConfigError, FormatError
from harmonia.nix.signing import PublicKey

_DATABASE = "var/nix/db/db.sqlite"  # beside the store directory, in Nix's own layout
_LOGS = "../../log/nix"  # from the directory of the database, likewise
_DAEMON = "../daemon-socket/socket"
_PATHS = ("virtual_nix_store", "real_nix_store", "nix_db_path", "log_dir", "cache_dir")
_FILES = ("tls_cert_path", "tls_key_path", "tls_client_ca_path", "tokens_path")
_PORT = 5000
_NEEDS = (
    ("tls_cert_path", "tls_key_path", "TLS needs both, set both or none"),
    ("tls_key_path", "tls_cert_path", "TLS needs both, set both or none"),
    ("tls_client_ca_path", "tls_cert_path", "only TLS knows client certificates, set both or none"),
    ("anonymous_scopes", "tokens_path", "nobody needs a token then; remove this, or set both"),
)


class WrongSettingError(ConfigError):
    """What is wrong with one key, such as `("zstd", "level")` or `("upstream", "0", "url")`."""

    def __init__(self, what: str, *key: str, key_file: str | None = None) -> None:
        table, part = (f"[[upstream]] {int(key[1]) + 1}: ", key[2:]) if key[0] == "upstream" and key[1:] else ("", key)
        name = ".".join(word if re.fullmatch(r"[A-Za-z0-9_-]+", word) else repr(word) for word in part)
        super().__init__(f"{table}{name}: {what}")
        self.key = key
        self.key_file = key_file
        """Which of several files that the key names."""


def _check(check: Callable[[Any], object], values: Iterable[object], *key: str) -> None:
    """WrongSettingError where one of the values that are given for that key does not pass."""
    for value in values:
        if value is not None:
            try:
                check(value)
            except FormatError as error:
                raise WrongSettingError(str(error), *key, key_file=str(value)) from None


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
        _check(value_types.check_window_log, [self.window_log], "zstd", "window_log")


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
    proxy: Annotated[
        str | None,
        Meta(
            extra={"default": "as the environment says"},
            description="The HTTP proxy that it is asked through: `http://host:port` or `http://user:password@host:port`;"
            ' `""` is none.',
        ),
    ] = None
    netrc: Annotated[
        File | None, Meta(description="A netrc(5) file with the user and password for its host, read as curl reads it.")
    ] = None
    credentials_file: Annotated[
        File | None, Meta(description="A file with `user:password` or `:token` for it, in place of `netrc`.")
    ] = None
    ca_file: Annotated[
        File | None,
        Meta(
            extra={"default": "the system's"}, description="Certificates in PEM form, one of which must vouch for it."
        ),
    ] = None


class PublishRules(msgspec.Struct, frozen=True, kw_only=True):
    """Publish policy: which store paths are served. Without rules, all valid paths are."""

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
        _check(value_types.check_public_key, self.signed_by, "publish", "signed_by")
        _check(value_types.check_pattern, self.allow, "publish", "allow")
        _check(value_types.check_pattern, self.deny, "publish", "deny")
        _check(value_types.check_absolute, self.gc_roots, "publish", "gc_roots")

    @property
    def public_keys(self) -> tuple[PublicKey, ...]:
        return tuple(map(PublicKey.parse, self.signed_by))


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    bind: Annotated[
        Address, Meta(description="Where to listen; port 0 takes a free one. Sockets from systemd take its place.")
    ] = f"[::]:{_PORT}"
    unix_socket_mode: Annotated[Mode, Meta(description="Permissions of the unix socket.")] = "0666"
    workers: Annotated[
        int,
        Meta(ge=1, le=1024, extra={"default": "`4`, or the CPUs if fewer"}, description="Processes that serve."),
    ] = msgspec.field(default_factory=lambda: min(4, len(os.sched_getaffinity(0))))
    max_connections: Annotated[
        Count, Meta(description="Connections that each worker has open at once; 0 is no limit.")
    ] = 2048
    max_connections_per_client: Annotated[
        Count,
        Meta(
            description="How many of them one client address may have, so that no client keeps out all others; 0 is no"
            " limit. Of `trusted_proxies`, and on unix sockets, they are not counted."
        ),
    ] = 1024
    max_connection_rate: Annotated[
        Count, Meta(description="No effect (upstream: TLS handshakes at once). Accepted with a warning.")
    ] = 256
    max_header_size: Annotated[
        Bytes, Meta(ge=1024, le=16384, description="Bytes that the head of a request may have.")
    ] = 8192
    header_timeout: Annotated[
        WholeSeconds, Meta(ge=1, le=3600, description="Seconds for which the head of a request may be on its way.")
    ] = 30
    keep_alive_timeout: Annotated[
        WholeSeconds,
        Meta(ge=1, le=86400, description="Seconds for which a connection may be idle between two requests."),
    ] = 120
    max_query_rate: Annotated[
        Count,
        Meta(
            description="Searches, pages of paths and directories, listings of more than 2000 entries, and questions"
            " for debug info that each worker answers to one client address in a minute; beyond it 429. 0 is no limit."
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
        WholeSeconds, Meta(ge=0, description="Seconds that running downloads get when the server is told to stop.")
    ] = 30
    tls_cert_path: Annotated[
        File | None, Meta(description="Certificate chain in PEM form, to serve HTTPS. Needs `tls_key_path`.")
    ] = None
    tls_key_path: Annotated[
        File | None, Meta(description="The certificate's private key in PEM form, without a passphrase.")
    ] = None
    tls_client_ca_path: Annotated[
        File | None,
        Meta(description="Certificates in PEM form, one of which must vouch for each client's own."),
    ] = None
    tokens_path: Annotated[
        File | None,
        Meta(description="File with hashes of tokens: clients need one of these tokens. `harmonia token` makes them."),
    ] = None
    anonymous_scopes: Annotated[Scopes, Meta(description="What needs no token. Needs `tokens_path`.")] = ()
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
        str | None,
        Meta(
            extra={"default": f"`{_DAEMON}` from the database's directory"},
            description="The Nix daemon's socket: what is being sent is kept from the garbage collector through it."
            ' `""` asks no daemon.',
        ),
    ] = None
    sign_key_paths: Annotated[
        tuple[File, ...], Meta(description="Files with secret keys: each narinfo is signed with each of them.")
    ] = ()
    sign_key_path: Annotated[
        File | None, Meta(description="Deprecated: one more of `sign_key_paths`. Accepted with a warning.")
    ] = None
    priority: Annotated[
        int, Meta(ge=0, le=2**31 - 1, description="Told in `/nix-cache-info`: clients ask the lowest cache first.")
    ] = 30
    narinfo_max_age: Annotated[
        WholeSeconds, Meta(ge=0, le=2**31, description="Seconds for which HTTP caches may keep a narinfo.")
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
        Url | None,
        Meta(extra={"default": "as the request tells"}, description="The URL of this cache that people are shown."),
    ] = None
    landing: Annotated[bool, Meta(description="Serve a page at `/` that tells people how to use this cache.")] = True
    serve_files: Annotated[
        bool,
        Meta(description="Serve at `/serve/` the files of store paths, for browsers. Nix itself never asks there."),
    ] = True
    browse: Annotated[
        bool, Meta(description="Let people search the store, and see which paths there are. Not for private stores.")
    ] = False
    metrics: Annotated[bool, Meta(description="Tell Prometheus at `/metrics` what the server does.")] = True
    metrics_bind: Annotated[
        Address | None,
        Meta(description="Where to listen for `/metrics` alone, without TLS. It is then not served at `bind`."),
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
    publish: Annotated[PublishRules, Meta(description="Which store paths are served.")] = PublishRules()

    def __post_init__(self) -> None:
        _check_paths(self)
        for given, needed, remedy in _NEEDS:
            if getattr(self, given) and getattr(self, needed) is None:
                raise WrongSettingError(f"set without {needed}; {remedy}", given)
        if self.address("metrics_bind") and not self.metrics:
            raise WrongSettingError("set without metrics; remove this or set metrics = true", "metrics_bind")
        if self.nar_compression == "zstd" and not self.enable_compression:
            what = 'nothing is compressed with enable_compression = false; set that to true, or this to "none"'
            raise WrongSettingError(what, "nar_compression")
        if isinstance(self.address("bind"), str) and self.tls_cert_path is not None:
            raise WrongSettingError("no TLS over a unix socket; bind to host:port or remove this", "tls_cert_path")
        _check(value_types.check_size, [self.cache_size], "cache_size")
        _check(value_types.check_proxy, self.trusted_proxies, "trusted_proxies")
        _check_upstreams(self.upstream, self.publish)

    def address(self, key: Literal["bind", "metrics_bind"]) -> value_types.HostAndPort | str | None:
        """That setting taken apart: host and port, or the path of a unix socket."""
        given = getattr(self, key)
        try:
            return None if given is None else value_types.address(given, _PORT if key == "bind" else None)
        except FormatError as error:
            raise WrongSettingError(str(error), key) from None

    @property
    def cache_bytes(self) -> int | None:
        """`cache_size` as a number."""
        return None if self.cache_size is None else amounts.size(self.cache_size)

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
        return self.log_dir or self._beside_database(_LOGS)

    @property
    def daemon(self) -> str | None:
        """The Nix daemon's socket, None where it is not to be asked."""
        return self._beside_database(_DAEMON) if self.daemon_socket is None else self.daemon_socket or None

    def _beside_database(self, path: str) -> str:
        return os.path.normpath(os.path.join(os.path.dirname(self.database), path))


def _check_paths(settings: Settings) -> None:
    for key in (*_PATHS, *_FILES):
        _check(value_types.check_path, [getattr(settings, key)], key)
    _check(value_types.check_path, settings.sign_key_paths, "sign_key_paths")
    _check(value_types.check_absolute, [settings.virtual_nix_store], "virtual_nix_store")


def _check_upstreams(upstreams: tuple[Upstream, ...], rules: PublishRules) -> None:
    if upstreams and rules != PublishRules():
        raise WrongSettingError(
            "it does not hold for what comes from an [[upstream]]; give one or the other", "publish"
        )
    urls = [upstream.url.rstrip("/") for upstream in upstreams]
    for number, upstream in enumerate(upstreams):
        table = ("upstream", str(number))
        for key in ("netrc", "credentials_file", "ca_file"):
            _check(value_types.check_path, [getattr(upstream, key)], *table, key)
        _check(value_types.check_public_key, upstream.public_keys, *table, "public_keys")
        _check(Proxy.parse, [upstream.proxy or None], *table, "proxy")
        if upstream.sign and not upstream.public_keys:
            what = "set without public_keys; only what they signed is signed again, so give them or remove this"
            raise WrongSettingError(what, *table, "sign")
        if upstream.netrc is not None and upstream.credentials_file is not None:
            raise WrongSettingError("set together with netrc; keep one of them", *table, "credentials_file")
        if urls.index(urls[number]) != number:
            raise WrongSettingError("given twice; keep one of them", *table, "url")


def default_cache_dir(environ: Mapping[str, str]) -> str:
    """The one that systemd made (of several, separated by colons, the first), else the user's."""
    home = environ.get("XDG_CACHE_HOME") or os.path.join(environ.get("HOME") or "/nonexistent", ".cache")
    return environ.get("CACHE_DIRECTORY", "").split(":")[0] or os.path.join(home, "harmonia")

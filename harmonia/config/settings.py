"""Settings as one frozen value, with the keys and meanings of upstream Harmonia 3.

The constructors check the relations between settings, so settings that contradict each other cannot be built.
`tables` has the settings in tables of the file, value_types.py the types of all values; loader.py reads the file.
`make docs` generates the tables in docs/reference/configuration.md from the descriptions.
"""

import os
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from harmonia.config import amounts, value_types
from harmonia.config.tables.lan import Lan
from harmonia.config.tables.mirror import Mirror
from harmonia.config.tables.publish import PublishRules
from harmonia.config.tables.push import Push
from harmonia.config.tables.upstream import Upstream, check_upstreams
from harmonia.config.tables.watch import Watch
from harmonia.config.tables.zstd import Zstd
from harmonia.config.value_types import (
    AbsolutePath,
    Address,
    Bytes,
    Count,
    File,
    Level,
    Location,
    Mode,
    Name,
    Proxies,
    Scopes,
    Seconds,
    Sentence,
    Size,
    Url,
    WholeSeconds,
)
from harmonia.config.wrong_setting import WrongSettingError, check_values
from harmonia.errors import FormatError

NO_DATABASE = ":memory:"
"""The path of the database if there is no local store."""
_DATABASE = "var/nix/db/db.sqlite"  # relative to the parent of the store directory, in Nix's layout
_LOGS = "../../log/nix"  # relative to the directory of the database, as is _DAEMON
_DAEMON = "../daemon-socket/socket"
_PATHS = (
    *("virtual_nix_store", "real_nix_store", "nix_db_path", "log_dir", "cache_dir"),
    *("tls_cert_path", "tls_key_path", "tls_client_ca_path", "tokens_path"),
)
_PORT = 5000
_PUSH_SCOPES = {"push", "sign"}
MAX_BULK_PATHS = 10_000
"""Paths for which one bulk request may ask (DeterminateSystems/nix-src#523)."""
_NEEDS = (
    ("tls_cert_path", "tls_key_path", "TLS needs both; set both or none"),
    ("tls_key_path", "tls_cert_path", "TLS needs both; set both or none"),
    ("tls_client_ca_path", "tls_cert_path", "client certificates need TLS; set both or none"),
    ("anonymous_scopes", "tokens_path", "without it, no client needs a token; remove this, or set both"),
)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    bind: Annotated[
        Address, Meta(description="Address to listen at. Port 0 is any free port. Sockets from systemd override it.")
    ] = f"[::]:{_PORT}"
    unix_socket_mode: Annotated[Mode, Meta(description="Permissions of the unix socket.")] = "0666"
    workers: Annotated[
        int,
        Meta(
            ge=1,
            le=1024,
            extra={"default": "the number of CPUs, at most `4`"},
            description="Processes that serve requests.",
        ),
    ] = msgspec.field(default_factory=lambda: min(4, len(os.sched_getaffinity(0))))
    max_connections: Annotated[
        Count, Meta(description="Maximum of open connections of each worker; 0 is no limit.")
    ] = 2048
    max_connections_per_client: Annotated[
        Count,
        Meta(
            description="Maximum of open connections of each worker from one client address, so that one client cannot"
            " lock out all others; 0 is no limit. Connections from `trusted_proxies` and on unix sockets do not count."
        ),
    ] = 1024
    max_connection_rate: Annotated[
        Count, Meta(description="No effect (in the Rust Harmonia: TLS handshakes at once). Accepted with a warning.")
    ] = 256
    max_header_size: Annotated[
        Bytes, Meta(ge=1024, le=16384, description="Maximum size of the head of a request, in bytes.")
    ] = 8192
    header_timeout: Annotated[
        WholeSeconds, Meta(ge=1, le=3600, description="Timeout for receiving the head of a request, in seconds.")
    ] = 30
    keep_alive_timeout: Annotated[
        WholeSeconds,
        Meta(ge=1, le=86400, description="Seconds after which a connection without a request is closed."),
    ] = 120
    max_query_rate: Annotated[
        Count,
        Meta(
            description="Maximum number of expensive requests in a minute, for each client address and each worker."
            " These are searches, pages of paths, directories and texts, listings of more than 2000 entries, and"
            " lookups of debug info. Further ones get 429. 0 is no limit."
        ),
    ] = 1200
    max_bulk_rate: Annotated[
        Count,
        Meta(
            description="Maximum number of paths in a minute, for each client address and each worker, for which bulk"
            " requests and requests for closures ask. Further requests get 429. 0 is no limit."
        ),
    ] = 120_000
    max_failed_auth_rate: Annotated[
        Count,
        Meta(
            description="Maximum number of wrong tokens in a minute, for each client address and each worker. Further"
            " ones get 429 instead of 401. 0 is no limit. Valid tokens are always accepted."
        ),
    ] = 120
    shutdown_grace: Annotated[
        WholeSeconds, Meta(ge=0, description="Seconds that running downloads have to finish when the server stops.")
    ] = 30
    idle_exit: Annotated[
        WholeSeconds,
        Meta(
            ge=0,
            description="Seconds without a request after which the server ends; systemd starts it again at the next"
            " connection. 0 is never. Has an effect only with sockets from systemd.",
        ),
    ] = 0
    tls_cert_path: Annotated[
        File | None, Meta(description="File with the certificate chain in PEM form, for HTTPS. Needs `tls_key_path`.")
    ] = None
    tls_key_path: Annotated[
        File | None, Meta(description="File with the certificate's private key in PEM form, without a passphrase.")
    ] = None
    tls_client_ca_path: Annotated[
        File | None,
        Meta(
            description="File with CA certificates in PEM form. Every client needs a certificate that chains to one of"
            " them."
        ),
    ] = None
    tokens_path: Annotated[
        File | None,
        Meta(description="File with hashes of tokens. Clients need one of these tokens. `harmonia token` makes them."),
    ] = None
    anonymous_scopes: Annotated[
        Scopes, Meta(description="Scopes that clients have without a token. Needs `tokens_path`.")
    ] = ()
    virtual_nix_store: Annotated[
        AbsolutePath, Meta(description="The store directory in the store paths that clients see.")
    ] = "/nix/store"
    local_store: Annotated[
        bool,
        Meta(
            description="Serve the store of this machine. If false, the server serves only the bucket of `mirror` and"
            " the paths of `upstream`, and needs no Nix."
        ),
    ] = True
    real_nix_store: Annotated[
        str | None,
        Meta(
            extra={"default": "`virtual_nix_store`"}, description="The store directory on disk, which may be a symlink."
        ),
    ] = None
    nix_db_path: Annotated[
        str | None,
        Meta(extra={"default": f"`../{_DATABASE}` from the store on disk"}, description="Nix's SQLite database."),
    ] = None
    log_dir: Annotated[
        str | None,
        Meta(
            extra={"default": f"`{_LOGS}` from the database's directory"},
            description="Directory of Nix's build logs, or of Hydra's.",
        ),
    ] = None
    log_redirect: Annotated[
        Url | None,
        Meta(
            description="URL of a server with further build logs, such as `https://hydra.example.org/log`: requests for"
            " a derivation's log that is not here are redirected to its name below this URL."
        ),
    ] = None
    daemon_socket: Annotated[
        str | None,
        Meta(
            extra={"default": f"`{_DAEMON}` from the database's directory"},
            description="The Nix daemon's socket, to protect paths from garbage collection while they are sent."
            ' `""` disables that.',
        ),
    ] = None
    sign_key_paths: Annotated[
        tuple[File, ...], Meta(description="Files with secret keys. Each narinfo gets a signature by each of them.")
    ] = ()
    sign_key_path: Annotated[
        File | None, Meta(description="Deprecated: use `sign_key_paths`. Accepted with a warning.")
    ] = None
    priority: Annotated[
        int,
        Meta(
            ge=0,
            le=2**31 - 1,
            description="Priority in `/nix-cache-info`. Clients ask the cache with the lowest number first;"
            " cache.nixos.org has 40.",
        ),
    ] = 30
    narinfo_max_age: Annotated[
        WholeSeconds, Meta(ge=0, le=2**31, description="Seconds for which HTTP caches may store a narinfo (`max-age`).")
    ] = 86400
    enable_compression: Annotated[
        bool, Meta(description="Compress with zstd for clients that accept it, and for `nar_compression`.")
    ] = True
    nar_compression: Annotated[
        Literal["auto", "zstd", "none"],
        Meta(
            description="The compression of the NARs in narinfos: `zstd`, with resumable downloads, or `none`. `auto`"
            " is `zstd` if the cache directory is writable, otherwise `none`."
        ),
    ] = "auto"
    cache_dir: Annotated[
        str | None,
        Meta(
            extra={"default": "`$CACHE_DIRECTORY`, `$XDG_CACHE_HOME/harmonia` or `~/.cache/harmonia`"},
            description="Directory of the cache: compressed NARs and the index of debug info.",
        ),
    ] = None
    cache_size: Annotated[
        Size | None,
        Meta(
            extra={"default": "half of the free space, at most `20G`"},
            description="Maximum size of the cache. The least recently used NARs are evicted first.",
        ),
    ] = None
    warm: Annotated[
        Literal["none", "new"],
        Meta(
            description="`new` compresses each path that becomes valid into the cache, before the first client asks,"
            " at idle priority and without evicting others. `none` waits for the first download."
        ),
    ] = "none"
    debug_info: Annotated[
        bool, Meta(description="Serve links to debug info at `/debuginfo`. The server scans each store path once.")
    ] = True
    trusted_proxies: Annotated[
        Proxies, Meta(description="Peers whose `X-Forwarded-…` are trusted; `unix` is every peer on a unix socket.")
    ] = ()
    nginx_location: Annotated[
        Location | None,
        Meta(
            description="Internal location of nginx, like `/harmonia-nar/`, for the directory `nar` in `cache_dir`."
            " nginx then sends NARs of the cache itself. Needs `trusted_proxies`."
        ),
    ] = None
    base_url: Annotated[
        Url | None,
        Meta(extra={"default": "from the request"}, description="The URL of this cache on the pages for people."),
    ] = None
    cache_name: Annotated[
        Name | None,
        Meta(
            extra={"default": "the host in the URL"},
            description="Name of this cache on the pages for people, and in the titles of their tabs.",
        ),
    ] = None
    cache_description: Annotated[
        Sentence | None,
        Meta(description="A sentence on the page at `/`, for example who runs this cache, and what it has."),
    ] = None
    landing: Annotated[bool, Meta(description="Serve a page at `/` that explains how to use this cache.")] = True
    serve_files: Annotated[
        bool,
        Meta(description="Serve the files of store paths at `/serve/`, for browsers. Nix does not need this."),
    ] = True
    browse: Annotated[bool, Meta(description="Let people list and search the store paths. Not for private stores.")] = (
        False
    )
    metrics: Annotated[bool, Meta(description="Serve metrics for Prometheus at `/metrics`.")] = True
    metrics_bind: Annotated[
        Address | None,
        Meta(description="Separate address for `/metrics`, without TLS. Then `bind` does not serve `/metrics`."),
    ] = None
    access_log: Annotated[bool, Meta(description="Log one line for each request.")] = False
    log_level: Annotated[Level, Meta(description="Log messages of this severity and above.")] = "info"
    log_format: Annotated[
        Literal["text", "json"], Meta(description="Format of the log: lines of text, or a JSON object on each line.")
    ] = "text"
    upstream_timeout: Annotated[
        Seconds,
        Meta(description="Maximum wait of a client for all upstreams, before a path counts as missing."),
    ] = 1.0
    zstd: Annotated[Zstd, Meta(description="Options of zstd compression.")] = Zstd()
    upstream: Annotated[
        tuple[Upstream, ...], Meta(description="Upstream caches, which are asked for paths that are not in the store.")
    ] = ()
    publish: Annotated[PublishRules, Meta(description="Which store paths are served.")] = PublishRules()
    push: Annotated[Push, Meta(description="Uploads of store paths.")] = Push()
    mirror: Annotated[Mirror, Meta(description="A bucket of an S3 service as a shared cache.")] = Mirror()
    lan: Annotated[Lan, Meta(description="Binary caches in the local network.")] = Lan()
    watch: Annotated[Watch, Meta(description="Uploads of new store paths to another cache.")] = Watch()

    def __post_init__(self) -> None:
        _check_paths(self)
        for given, needed, remedy in _NEEDS:
            if getattr(self, given) and getattr(self, needed) is None:
                raise WrongSettingError(f"set without {needed}; {remedy}", given)
        if self.address("metrics_bind") and not self.metrics:
            raise WrongSettingError("set without metrics; remove this or set metrics = true", "metrics_bind")
        if self.nginx_location is not None and not self.trusted_proxies:
            what = 'set without trusted_proxies; add the address of nginx there, or "unix"'
            raise WrongSettingError(what, "nginx_location")
        if 0 < self.max_bulk_rate < MAX_BULK_PATHS:
            what = f"less than one request, which may have {MAX_BULK_PATHS} paths; set it to that or more, or to 0"
            raise WrongSettingError(what, "max_bulk_rate")
        for key, compressing in (("nar_compression", "zstd"), ("warm", "new")):
            if getattr(self, key) == compressing and not self.enable_compression:
                what = 'enable_compression = false disables compression; set that to true, or this to "none"'
                raise WrongSettingError(what, key)
        if isinstance(self.address("bind"), str) and self.tls_cert_path is not None:
            raise WrongSettingError(
                "TLS needs TCP, not a unix socket; bind to host:port or remove this", "tls_cert_path"
            )
        check_values(value_types.check_size, [self.cache_size], "cache_size")
        check_values(value_types.check_trusted_proxy, self.trusted_proxies, "trusted_proxies")
        check_upstreams(self.upstream)
        _check_publish(self)
        _check_local_store(self)  # before `_check_push`, which would blame daemon_socket
        _check_push(self)
        _check_lan(self)

    def address(self, key: Literal["bind", "metrics_bind"]) -> value_types.HostAndPort | str | None:
        """Return the setting's host and port, or its path of a unix socket, or None if it is not set.

        Raises WrongSettingError if the value is not an address.
        """
        given = getattr(self, key)
        try:
            return None if given is None else value_types.address(given, _PORT if key == "bind" else None)
        except FormatError as error:
            raise WrongSettingError(str(error), key) from None

    @property
    def sources(self) -> tuple[Upstream, ...]:
        """Return the caches that are asked for paths that the store lacks: `upstream`, and last the mirror's bucket."""
        return (*self.upstream, self.mirror.source) if self.mirror.is_read else self.upstream

    @property
    def asks_upstreams(self) -> bool:
        """True if other caches may be asked for paths that the store lacks: `sources`, or siblings."""
        return bool(self.sources or self.lan.public_keys)

    @property
    def processes(self) -> int:
        """Return the number of processes: the workers, and those that warm the cache and write to the mirror."""
        return self.workers + (self.warm == "new") + self.mirror.write_served

    @property
    def cache_bytes(self) -> int | None:
        """Return `cache_size` in bytes, or None for the default."""
        return None if self.cache_size is None else amounts.size(self.cache_size)

    @property
    def real_store(self) -> str:
        """Return the path of the store directory on disk, without symlinks."""
        return os.path.realpath(self.real_nix_store or self.virtual_nix_store)

    @property
    def database(self) -> str:
        """Return the path of Nix's database.

        The default is beside the store directory. If that is a symlink and there is no database beside it, the default
        is beside the target. Without a local store, it is an empty database in memory.
        """
        if not self.local_store:
            return NO_DATABASE
        named = os.path.abspath(self.real_nix_store or self.virtual_nix_store)
        beside = [os.path.join(os.path.dirname(store), _DATABASE) for store in (named, self.real_store)]
        return self.nix_db_path or next(filter(os.path.exists, beside), beside[0])

    @property
    def logs(self) -> str:
        """Return the path of the directory of build logs."""
        if not self.local_store:
            return os.devnull
        return self.log_dir or self._beside_database(_LOGS)

    @property
    def daemon(self) -> str | None:
        """Return the path of the Nix daemon's socket, or None if the daemon is disabled or there is no local store."""
        if not self.local_store:
            return None
        return self._beside_database(_DAEMON) if self.daemon_socket is None else self.daemon_socket or None

    def _beside_database(self, path: str) -> str:
        return os.path.normpath(os.path.join(os.path.dirname(self.database), path))


def _check_paths(settings: Settings) -> None:
    for key in _PATHS:
        check_values(value_types.check_path, [getattr(settings, key)], key)
    check_values(value_types.check_path, settings.sign_key_paths, "sign_key_paths")
    check_values(value_types.check_absolute, [settings.virtual_nix_store], "virtual_nix_store")


def _check_push(settings: Settings) -> None:
    push = settings.push
    if scope := next(filter(_PUSH_SCOPES.__contains__, settings.anonymous_scopes), None):
        what = f'"{scope}" would let everyone push; remove it, and give pushers a token'
        raise WrongSettingError(what, "anonymous_scopes")
    if push.client_certificates and settings.tls_client_ca_path is None:
        what = "set without tls_client_ca_path; set both or none"
        raise WrongSettingError(what, "push", "client_certificates")
    if not push.enable:
        return
    if settings.tokens_path is None and not push.client_certificates:
        what = "set without tokens_path; set it to a file with a token of scope push, made by harmonia token"
        raise WrongSettingError(what, "push", "enable")
    if settings.daemon is None:
        raise WrongSettingError('daemon_socket = "" disables the Nix daemon; remove that, or this', "push", "enable")
    if isinstance(settings.address("bind"), tuple) and not (settings.tls_cert_path or push.allow_without_tls):
        what = "tokens would be sent without TLS; set tls_cert_path, or bind to a unix socket behind a proxy with TLS,"
        raise WrongSettingError(f"{what} or set push.allow_without_tls = true", "push", "enable")


def _check_publish(settings: Settings) -> None:
    """Raise WrongSettingError if there are publish rules, and paths would be served that they do not apply to."""
    if settings.publish == PublishRules():
        return
    what = None
    if settings.upstream:
        what = "paths from an [[upstream]]; set one or the other"
    elif settings.mirror.is_read:
        what = "paths from the bucket of [mirror]; set mirror.read = false, or no rules"
    elif settings.mirror.write_served:
        what = "the bucket of [mirror]; remove them, or set mirror.write_served = false"
    elif settings.lan.public_keys:
        what = "paths from siblings; set one or the other"
    if what is not None:
        raise WrongSettingError(f"publish rules do not apply to {what}", "publish")


def _check_local_store(settings: Settings) -> None:
    """Raise WrongSettingError if there is no local store, and another setting needs it."""
    if settings.local_store:
        return
    if settings.mirror.write_served:
        raise WrongSettingError("set together with local_store = false; remove one of them", "mirror", "write_served")
    if not settings.asks_upstreams:
        what = "false without a [mirror] to read and without any [[upstream]], so nothing could be served; set one"
        raise WrongSettingError(what, "local_store")
    if settings.push.enable:
        raise WrongSettingError("set together with local_store = false; remove one of them", "push", "enable")


def _check_lan(settings: Settings) -> None:
    if not settings.lan.announce:
        return
    if settings.tls_cert_path is not None:
        raise WrongSettingError("siblings use plain HTTP; remove this, or tls_cert_path", "lan", "announce")
    if settings.tokens_path is not None and "read" not in settings.anonymous_scopes:
        raise WrongSettingError("siblings send no token; remove this, or tokens_path", "lan", "announce")


TABLES: dict[str, type[msgspec.Struct]] = {
    "zstd": Zstd,
    "publish": PublishRules,
    "push": Push,
    "mirror": Mirror,
    "lan": Lan,
    "watch": Watch,
}
"""The settings that are tables of other settings."""

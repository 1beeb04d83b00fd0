"""Settings as one frozen value, with the keys and meanings of upstream Harmonia 3.

The constructors check the relations between settings, so settings that contradict each other cannot be built.
value_types.py has the types of the values; loader.py reads them from a file. `make docs` generates the tables in
docs/reference/configuration.md from the descriptions below.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from harmonia.config import amounts, name_patterns, value_types
from harmonia.config.proxy import Proxy
from harmonia.config.value_types import (
    AbsolutePath,
    Address,
    Bytes,
    Count,
    Days,
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
    UploadTarget,
    Url,
    WholeSeconds,
    WindowLog,
)
from harmonia.errors import ConfigError, FormatError
from harmonia.nix.signing import PublicKey

NO_DATABASE = ":memory:"
"""The path of the database if there is no local store."""
_DATABASE = "var/nix/db/db.sqlite"  # relative to the parent of the store directory, in Nix's layout
_LOGS = "../../log/nix"  # relative to the directory of the database, as is _DAEMON
_DAEMON = "../daemon-socket/socket"
_PATHS = ("virtual_nix_store", "real_nix_store", "nix_db_path", "log_dir", "cache_dir")
_FILES = ("tls_cert_path", "tls_key_path", "tls_client_ca_path", "tokens_path")
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


class WrongSettingError(ConfigError):
    """The value of a key, such as `("zstd", "level")` or `("upstream", "0", "url")`, is wrong."""

    def __init__(self, what: str, *key: str, key_file: str | None = None) -> None:
        table, part = (f"[[upstream]] {int(key[1]) + 1}: ", key[2:]) if key[0] == "upstream" and key[1:] else ("", key)
        name = ".".join(word if re.fullmatch(r"[A-Za-z0-9_-]+", word) else repr(word) for word in part)
        super().__init__(f"{table}{name}: {what}")
        self.key = key
        self.key_file = key_file
        """The wrong file, if the key names several files."""


def _check(check: Callable[[Any], object], values: Iterable[object], *key: str) -> None:
    """Raise WrongSettingError for `key` if `check` raises FormatError for one of its values. Skip values of None."""
    for value in values:
        if value is not None:
            try:
                check(value)
            except FormatError as error:
                raise WrongSettingError(str(error), *key, key_file=str(value)) from None


class Zstd(msgspec.Struct, frozen=True, kw_only=True):
    level: Annotated[
        int, Meta(ge=-7, le=22, description="Higher levels are slower and compress more; 0 is libzstd's default (3).")
    ] = 3
    long_distance_matching: Annotated[
        bool, Meta(description="Find repetitions that are far apart. Needs four times the memory.")
    ] = False
    window_log: Annotated[
        WindowLog,
        Meta(
            description="log2 of the match window in bytes; 0 is the default of the level, or 25 (32 MiB) with"
            " `long_distance_matching`. NARs are compressed in pieces of this size, but at least 8 MiB."
        ),
    ] = 0
    max_ldm_encoders_per_worker: Annotated[
        Count, Meta(description="Threads of each worker that compress with `long_distance_matching`; 0 is one per CPU.")
    ] = 16

    def __post_init__(self) -> None:
        _check(value_types.check_window_log, [self.window_log], "zstd", "window_log")


class Upstream(msgspec.Struct, frozen=True, kw_only=True):
    """An upstream cache, which is asked for paths that are not in the store."""

    url: Annotated[Url, Meta(description="URL of the upstream, as in the setting `substituters` of Nix.")]
    public_keys: Annotated[
        tuple[str, ...],
        Meta(
            description="Public keys like `name:base64`. Only paths signed by one of them are passed on; with `[]`, all"
            " paths."
        ),
    ] = ()
    mode: Annotated[
        Literal["proxy", "redirect"],
        Meta(
            description="`proxy` fetches NARs through this server and caches them; `redirect` sends clients to the"
            " upstream."
        ),
    ] = "proxy"
    priority: Annotated[
        int,
        Meta(
            ge=0,
            le=2**31 - 1,
            description="The upstream with the lowest number is asked first, those with equal numbers together.",
        ),
    ] = 50
    sign: Annotated[
        bool,
        Meta(
            description="Also sign its paths with our keys, if one of `public_keys` signed them. Needs `public_keys`."
        ),
    ] = False
    connect_timeout: Annotated[Seconds, Meta(description="Timeout for a connection to the upstream.")] = 2.0
    timeout: Annotated[
        Seconds, Meta(description="Timeout for the first byte of a response, and for each pause between its bytes.")
    ] = 10.0
    proxy: Annotated[
        str | None,
        Meta(
            extra={"default": "from the environment"},
            description="The HTTP proxy for this upstream: `http://host:port` or `http://user:password@host:port`;"
            ' `""` is a direct connection.',
        ),
    ] = None
    fetch_ahead: Annotated[
        Size,
        Meta(
            description="Maximum size of the NARs that are fetched before a client requests them, if the upstream is"
            " also a Harmonia and `mode` is `proxy`; 0 fetches none ahead."
        ),
    ] = "256M"
    netrc: Annotated[
        File | None,
        Meta(description="netrc(5) file with user and password for the upstream's host, parsed as by curl."),
    ] = None
    credentials_file: Annotated[
        File | None, Meta(description="File with `user:password` or `:token` for the upstream, instead of `netrc`.")
    ] = None
    ca_file: Annotated[
        File | None,
        Meta(
            extra={"default": "the system's"},
            description="File with CA certificates in PEM form. The upstream's certificate must chain to one of them.",
        ),
    ] = None


class PublishRules(msgspec.Struct, frozen=True, kw_only=True):
    """Publish policy: the rules for which store paths are served. Without rules, all valid paths are."""

    signed_by: Annotated[
        tuple[str, ...],
        Meta(description="Public keys like `name:base64`: serve only paths with a stored signature by one of them."),
    ] = ()
    allow: Annotated[
        tuple[str, ...], Meta(description='Patterns like "hello-*": serve only paths whose name matches one of them.')
    ] = ()
    deny: Annotated[
        tuple[str, ...], Meta(description="Patterns: do not serve paths whose name matches one of them.")
    ] = ()
    gc_roots: Annotated[
        tuple[str, ...],
        Meta(
            description="Store paths, symlinks to them, or directories with such symlinks: serve only these paths and"
            " their closures."
        ),
    ] = ()

    def __post_init__(self) -> None:
        _check(value_types.check_public_key, self.signed_by, "publish", "signed_by")
        _check(name_patterns.check_pattern, self.allow, "publish", "allow")
        _check(name_patterns.check_pattern, self.deny, "publish", "deny")
        _check(value_types.check_absolute, self.gc_roots, "publish", "gc_roots")

    @property
    def public_keys(self) -> tuple[PublicKey, ...]:
        """Return the keys in `signed_by`."""
        return tuple(map(PublicKey.parse, self.signed_by))


class Push(msgspec.Struct, frozen=True, kw_only=True):
    """Uploads: `nix copy --to` the URL of the cache with `/push`."""

    enable: Annotated[
        bool,
        Meta(
            description="Accept store paths at `/push`. Needs `tokens_path` or `client_certificates`, and the Nix"
            " daemon, which checks the signatures."
        ),
    ] = False
    allow_without_tls: Annotated[
        bool,
        Meta(
            description="Accept pushes over plain HTTP on TCP, where others on the network can read the tokens and use"
            " them. For a proxy on this machine that does TLS, a unix socket is better."
        ),
    ] = False
    client_certificates: Annotated[
        tuple[str, ...],
        Meta(
            description="Common names of client certificates that may push without a token. Needs `tls_client_ca_path`."
        ),
    ] = ()
    max_nar_size: Annotated[Size, Meta(description="Maximum size of a pushed NAR, as sent and unpacked.")] = "16G"
    spool_size: Annotated[
        Size,
        Meta(
            description="Maximum size of all NARs that wait for their narinfo, in `cache_dir`. Nix 2.35 and newer send"
            " all NARs of a closure first."
        ),
    ] = "32G"
    keep: Annotated[
        Days,
        Meta(ge=60, description="Seconds after the last push or download for which a pushed path is a GC root."),
    ] = 30 * 86400
    state_dir: Annotated[
        str | None,
        Meta(
            extra={"default": "`$STATE_DIRECTORY`, `$XDG_STATE_HOME/harmonia` or `~/.local/state/harmonia`"},
            description="Directory of the GC roots and build logs of pushed paths.",
        ),
    ] = None
    sign_key_path: Annotated[
        File | None,
        Meta(
            description="File with a secret key that the Nix daemon trusts. It signs unsigned paths of pushers whose"
            " token has the scope `sign`: they can then push anything. With `sign:PATTERN`, it signs only paths whose"
            " name matches."
        ),
    ] = None
    sign_names: Annotated[
        tuple[str, ...],
        Meta(
            description='Patterns like "hello-*": sign only paths whose name matches one of them, whatever the token'
            " allows. Default: all."
        ),
    ] = ()

    def __post_init__(self) -> None:
        for key in ("max_nar_size", "spool_size"):
            _check(value_types.check_size, [getattr(self, key)], "push", key)
        if amounts.size(self.max_nar_size) > amounts.size(self.spool_size):
            raise WrongSettingError("more than spool_size; lower it, or raise spool_size", "push", "max_nar_size")
        _check(name_patterns.check_pattern, self.sign_names, "push", "sign_names")
        for key in ("state_dir", "sign_key_path"):
            _check(value_types.check_path, [getattr(self, key)], "push", key)


class Lan(msgspec.Struct, frozen=True, kw_only=True):
    """Siblings: binary caches in the local network, which announce themselves by multicast DNS (UDP port 5353)."""

    announce: Annotated[
        bool,
        Meta(
            description="Announce this server in the local network as `_nix_binary_cache._tcp`. Needs the Python"
            " package zeroconf (`harmonia[lan]`)."
        ),
    ] = False
    public_keys: Annotated[
        tuple[str, ...],
        Meta(
            description="Public keys like `name:base64`. With at least one, servers that announce themselves become"
            " upstreams for paths that one of these keys signed. They learn which paths are asked for. Needs zeroconf,"
            " too."
        ),
    ] = ()
    priority: Annotated[
        int, Meta(ge=0, le=2**31 - 1, description="Priority of the siblings among the upstreams (`upstream.priority`).")
    ] = 60


class Mirror(msgspec.Struct, frozen=True, kw_only=True):
    """A bucket of an S3 service that has a plain Nix binary cache, shared by several servers."""

    bucket: Annotated[
        str | None,
        Meta(
            description="Name of the bucket. `harmonia mirror` writes store paths to it. Needs `endpoint`, and the"
            " Python package obstore (`harmonia[s3]`)."
        ),
    ] = None
    endpoint: Annotated[
        Url | None,
        Meta(description="URL of the S3 service. The bucket's name follows it as the first part of the path."),
    ] = None
    region: Annotated[str, Meta(description="Region of the S3 service, for signatures.")] = "us-east-1"
    prefix: Annotated[str, Meta(description="Folder of the cache in the bucket. Default: the whole bucket.")] = ""
    credentials_file: Annotated[
        File | None,
        Meta(
            description="File with `ACCESS_KEY_ID:SECRET_ACCESS_KEY`. Without it, requests are anonymous, enough to"
            " read a public bucket."
        ),
    ] = None
    read: Annotated[
        bool,
        Meta(description="Serve paths of the bucket that the store does not have. The bucket precedes `upstream`."),
    ] = True
    redirect: Annotated[
        bool,
        Meta(
            description="Send clients to the bucket for NARs, with a URL that is signed for 15 minutes, instead of"
            " fetching NARs through this server."
        ),
    ] = False
    write_served: Annotated[
        bool,
        Meta(
            description="Write the closure of each store path that a client downloads to the bucket. Downloads never"
            " wait for this: paths wait in a queue below `cache_dir`."
        ),
    ] = False
    public_keys: Annotated[
        tuple[str, ...],
        Meta(
            extra={"default": "those of `sign_key_paths`"},
            description="Public keys like `name:base64`. Only paths of the bucket that are signed by one of them are"
            " served; without any keys, all paths.",
        ),
    ] = ()
    connect_timeout: Annotated[Seconds, Meta(description="Timeout for a connection to the S3 service, to read.")] = 2.0
    timeout: Annotated[
        Seconds, Meta(description="Timeout for the first byte of a response, and for each pause between its bytes.")
    ] = 10.0

    def __post_init__(self) -> None:
        _check(value_types.check_bucket, [self.bucket], "mirror", "bucket")
        _check(value_types.check_public_key, self.public_keys, "mirror", "public_keys")
        _check(value_types.check_prefix, [self.prefix or None], "mirror", "prefix")
        _check(value_types.check_path, [self.credentials_file], "mirror", "credentials_file")
        for given, needed in (("bucket", "endpoint"), ("endpoint", "bucket")):
            if getattr(self, given) is not None and getattr(self, needed) is None:
                raise WrongSettingError(f"set without {needed}; set both or none", "mirror", given)
        if self.write_served and self.bucket is None:
            raise WrongSettingError("set without bucket; set both or none", "mirror", "write_served")
        if self.redirect and self.credentials_file is None:
            what = "set without credentials_file, whose key signs the URLs; set both, or use the bucket as [[upstream]]"
            raise WrongSettingError(what, "mirror", "redirect")

    @property
    def is_read(self) -> bool:
        """Return True if paths of the bucket are served."""
        return self.read and self.bucket is not None

    @property
    def source(self) -> Upstream:
        """Return the bucket as an upstream, which is asked before all others."""
        return Upstream(
            url=self.url,
            public_keys=self.public_keys,
            priority=-1,
            connect_timeout=self.connect_timeout,
            timeout=self.timeout,
        )

    @property
    def url(self) -> str:
        """Return the URL of the cache in the bucket."""
        return "/".join(filter(None, ((self.endpoint or "").rstrip("/"), self.bucket, self.prefix)))


class Watch(msgspec.Struct, frozen=True, kw_only=True):
    """Uploads of each path that becomes valid in the store, by `harmonia watch`."""

    url: Annotated[
        UploadTarget | None,
        Meta(
            description="URL of the binary cache to upload to, such as the `/push` of another Harmonia, or `mirror`,"
            " the bucket of `[mirror]`."
        ),
    ] = None
    netrc: Annotated[
        File | None,
        Meta(
            extra={"default": "`$NETRC`, `/etc/nix/netrc` or `~/.netrc`"},
            description="netrc(5) file with user and password for the host of `url`.",
        ),
    ] = None
    jobs: Annotated[int, Meta(ge=1, le=100, description="Number of NARs to upload at a time.")] = 8
    new_paths: Annotated[
        bool,
        Meta(
            description="Upload each path that becomes valid, except derivations. If false, only those of `gc_roots`"
            " and of the post-build hook."
        ),
    ] = True
    allow: Annotated[
        tuple[str, ...],
        Meta(description='Patterns like "hello-*": upload only those new paths and `gc_roots` whose name matches one.'),
    ] = ()
    deny: Annotated[
        tuple[str, ...],
        Meta(description="Patterns: do not upload those new paths and `gc_roots` whose name matches one."),
    ] = ()
    not_signed_by: Annotated[
        tuple[str, ...],
        Meta(
            description="Public keys like `name:base64`: do not upload paths with a stored signature by one of them,"
            " not even as references, because clients get these from another cache."
        ),
    ] = ()
    gc_roots: Annotated[
        tuple[str, ...],
        Meta(
            description="Store paths, symlinks to them, or directories with such symlinks: upload these paths, and each"
            " path that one of them leads to later."
        ),
    ] = ()
    state_dir: Annotated[
        str | None,
        Meta(
            extra={"default": "`$STATE_DIRECTORY`, `$XDG_STATE_HOME/harmonia` or `~/.local/state/harmonia`"},
            description="Directory of the queue and of NARs that are being compressed.",
        ),
    ] = None
    socket: Annotated[
        str | None,
        Meta(
            extra={"default": "`$RUNTIME_DIRECTORY/socket`, if that variable is set"},
            description="Unix socket at which the post-build hook `harmonia-hook` hands over paths.",
        ),
    ] = None
    metrics_file: Annotated[
        str | None,
        Meta(
            extra={"default": "`$RUNTIME_DIRECTORY/metrics.prom`, if that variable is set"},
            description="File with metrics, for the textfile collector of Prometheus' node exporter.",
        ),
    ] = None

    def __post_init__(self) -> None:
        _check(name_patterns.check_pattern, self.allow, "watch", "allow")
        _check(name_patterns.check_pattern, self.deny, "watch", "deny")
        _check(value_types.check_public_key, self.not_signed_by, "watch", "not_signed_by")
        _check(value_types.check_absolute, self.gc_roots, "watch", "gc_roots")
        for key in ("netrc", "state_dir", "socket", "metrics_file"):
            _check(value_types.check_path, [getattr(self, key)], "watch", key)


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
        if self.nar_compression == "zstd" and not self.enable_compression:
            what = 'enable_compression = false disables compression; set that to true, or this to "none"'
            raise WrongSettingError(what, "nar_compression")
        if self.warm == "new" and not self.enable_compression:
            what = 'enable_compression = false disables compression; set that to true, or this to "none"'
            raise WrongSettingError(what, "warm")
        if isinstance(self.address("bind"), str) and self.tls_cert_path is not None:
            raise WrongSettingError(
                "TLS needs TCP, not a unix socket; bind to host:port or remove this", "tls_cert_path"
            )
        _check(value_types.check_size, [self.cache_size], "cache_size")
        _check(value_types.check_trusted_proxy, self.trusted_proxies, "trusted_proxies")
        _check_upstreams(self.upstream, self.publish)
        _check_push(self)
        _check_sources(self)
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
    for key in (*_PATHS, *_FILES):
        _check(value_types.check_path, [getattr(settings, key)], key)
    _check(value_types.check_path, settings.sign_key_paths, "sign_key_paths")
    _check(value_types.check_absolute, [settings.virtual_nix_store], "virtual_nix_store")


def _check_upstreams(upstreams: tuple[Upstream, ...], rules: PublishRules) -> None:
    if upstreams and rules != PublishRules():
        raise WrongSettingError(
            "publish rules do not apply to paths from an [[upstream]]; set one or the other", "publish"
        )
    urls = [upstream.url.rstrip("/") for upstream in upstreams]
    for number, upstream in enumerate(upstreams):
        table = ("upstream", str(number))
        for key in ("netrc", "credentials_file", "ca_file"):
            _check(value_types.check_path, [getattr(upstream, key)], *table, key)
        _check(value_types.check_public_key, upstream.public_keys, *table, "public_keys")
        _check(Proxy.parse, [upstream.proxy or None], *table, "proxy")
        _check(value_types.check_size, [upstream.fetch_ahead], *table, "fetch_ahead")
        if upstream.sign and not upstream.public_keys:
            what = "set without public_keys; only paths that they signed are signed again, so set them or remove this"
            raise WrongSettingError(what, *table, "sign")
        if upstream.netrc is not None and upstream.credentials_file is not None:
            raise WrongSettingError("set together with netrc; keep one of them", *table, "credentials_file")
        if urls.index(urls[number]) != number:
            raise WrongSettingError("given twice; keep one of them", *table, "url")


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


def _check_sources(settings: Settings) -> None:
    if settings.mirror.is_read and settings.publish != PublishRules():
        what = "publish rules do not apply to paths from the bucket of [mirror]; set mirror.read = false, or no rules"
        raise WrongSettingError(what, "publish")
    if settings.mirror.write_served and not settings.local_store:
        raise WrongSettingError("set together with local_store = false; remove one of them", "mirror", "write_served")
    if settings.mirror.write_served and settings.publish != PublishRules():
        what = "publish rules do not apply to the bucket of [mirror]; remove them, or set mirror.write_served = false"
        raise WrongSettingError(what, "publish")
    if not settings.local_store and not settings.asks_upstreams:
        what = "false without a [mirror] to read and without any [[upstream]], so nothing could be served; set one"
        raise WrongSettingError(what, "local_store")
    if not settings.local_store and settings.push.enable:
        raise WrongSettingError("set together with local_store = false; remove one of them", "push", "enable")


def _check_lan(settings: Settings) -> None:
    _check(value_types.check_public_key, settings.lan.public_keys, "lan", "public_keys")
    if settings.lan.public_keys and settings.publish != PublishRules():
        raise WrongSettingError("publish rules do not apply to paths from siblings; set one or the other", "publish")
    if not settings.lan.announce:
        return
    if settings.tls_cert_path is not None:
        raise WrongSettingError("siblings use plain HTTP; remove this, or tls_cert_path", "lan", "announce")
    if settings.tokens_path is not None and "read" not in settings.anonymous_scopes:
        raise WrongSettingError("siblings send no token; remove this, or tokens_path", "lan", "announce")


def default_state_dir(environ: Mapping[str, str]) -> str:
    """Return the first directory in systemd's `$STATE_DIRECTORY`, or `harmonia` in the user's state directory."""
    home = environ.get("XDG_STATE_HOME") or os.path.join(environ.get("HOME") or "/nonexistent", ".local/state")
    return environ.get("STATE_DIRECTORY", "").split(":")[0] or os.path.join(home, "harmonia")


def default_runtime_file(environ: Mapping[str, str], name: str) -> str | None:
    """Return the path of a file in the first directory in systemd's `$RUNTIME_DIRECTORY`, or None without it."""
    directory = environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
    return os.path.join(directory, name) if directory else None


def default_cache_dir(environ: Mapping[str, str]) -> str:
    """Return the first directory in systemd's `$CACHE_DIRECTORY`, or `harmonia` in the user's cache directory."""
    home = environ.get("XDG_CACHE_HOME") or os.path.join(environ.get("HOME") or "/nonexistent", ".cache")
    return environ.get("CACHE_DIRECTORY", "").split(":")[0] or os.path.join(home, "harmonia")


TABLES: dict[str, type[Zstd | PublishRules | Push | Mirror | Lan | Watch]] = {
    "zstd": Zstd,
    "publish": PublishRules,
    "push": Push,
    "mirror": Mirror,
    "lan": Lan,
    "watch": Watch,
}
"""The settings that are tables of other settings."""

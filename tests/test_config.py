"""The configuration file: values have their documented meaning, and an error is one line with cause and remedy."""

import difflib
import json
import logging
import os
import pickle
import re
import shutil
import ssl
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import SigningKey

from harmonia.config.credentials import authorization, secret_keys, tls_context
from harmonia.config.loader import Source, parse, read
from harmonia.config.settings import Settings
from harmonia.config.tables.publish import PublishRules
from harmonia.config.tables.push import Push
from harmonia.config.tables.upstream import Upstream
from harmonia.config.tables.zstd import Zstd
from harmonia.errors import ConfigError
from harmonia.nix.signing import SecretKey
from harmonia.process import preflight
from harmonia.process.preflight import load
from harmonia.tools.store_builder import StoreBuilder

SECRET = SecretKey("cache.example.org-1", SigningKey(bytes(range(32)))).export()
BASE64 = SECRET.partition(":")[2]

# Every key of the Rust Harmonia 3.2, and `daemon_socket` of 3.0.
RUST_HARMONIA_CONFIG = """
bind = "[::]:5000"          # or "unix:/run/harmonia/socket"
workers = 4
max_connections = 2048
max_connection_rate = 256
priority = 50
virtual_nix_store = "/nix/store"
real_nix_store = "{root}/nix/store"
nix_db_path = "{root}/nix/var/nix/db/db.sqlite"
daemon_socket = "/nix/var/nix/daemon-socket/socket"
enable_compression = true
sign_key_path = "{root}/old.secret"
sign_key_paths = [ "{root}/cache.secret" ]
tls_cert_path = "{root}/cert.pem"
tls_key_path = "{root}/key.pem"

[zstd]
level = 1
long_distance_matching = true
window_log = 0
max_ldm_encoders_per_worker = 16
"""


def settings(text: str = "", **environ: str) -> Settings:
    return parse(text, "h.toml", environ)


def error_of(text: str = "", **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        settings(text, **environ)
    return str(caught.value)


@dataclass(frozen=True)
class Machine:
    """A store with its database, and a configuration file that names both."""

    root: Path
    environ: dict[str, str] = field(default_factory=dict)

    @property
    def store(self) -> Path:
        return self.root / "nix" / "store"

    @property
    def database(self) -> Path:
        return self.root / "nix" / "var" / "nix" / "db" / "db.sqlite"

    def file(self, name: str, content: str = SECRET, mode: int = 0o600) -> Path:
        path = self.root / name
        path.write_text(content)
        path.chmod(mode)
        return path

    def load(self, more: str = "") -> Settings:
        path = self.file("harmonia.toml", f"real_nix_store = {json.dumps(str(self.store))}\n{more}")
        return load(str(path), self.environ)

    def error_of(self, more: str = "") -> str:
        with pytest.raises(ConfigError) as caught:
            self.load(more)
        return str(caught.value).replace(str(self.root), "ROOT")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    StoreBuilder(tmp_path).add_text("text", b"text")
    return Machine(tmp_path)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Create a certificate and its key, as text."""
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    subprocess.run(
        [*command.split(), "-keyout", "key.pem", "-out", "cert.pem"], cwd=folder, check=True, capture_output=True
    )
    return (folder / "cert.pem").read_text(), (folder / "key.pem").read_text()


# Values


def test_defaults_equal_those_of_the_rust_harmonia() -> None:
    loaded = settings()
    assert (loaded.bind, loaded.max_connections, loaded.priority) == ("[::]:5000", 2048, 30)
    assert (loaded.virtual_nix_store, loaded.enable_compression) == ("/nix/store", True)
    assert loaded.zstd == Zstd(level=3, long_distance_matching=False, window_log=0, max_ldm_encoders_per_worker=16)


@pytest.mark.parametrize(("cpus", "workers"), [(1, 1), (4, 4), (64, 4)])
def test_workers_default_to_the_cpus_and_at_most_four(monkeypatch: pytest.MonkeyPatch, cpus: int, workers: int) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cpus)))
    assert settings().workers == workers


@pytest.mark.parametrize(
    ("bind", "address"),
    [
        ("[::]:5000", ("::", 5000)),
        ("[::1]:0", ("::1", 0)),
        ("[fe80::1%eth0]:80", ("fe80::1%eth0", 80)),
        ("127.0.0.1:65535", ("127.0.0.1", 65535)),
        ("cache.example.org:5000", ("cache.example.org", 5000)),
        ("unix:/run/harmonia/socket", "/run/harmonia/socket"),
        ("unix:///run/harmonia/socket", "/run/harmonia/socket"),
        ("unix:socket", "socket"),
        ("unix:/" + "x" * 106, "/" + "x" * 106),
        ("/run/harmonia/socket", "/run/harmonia/socket"),
        (":5000", ("::", 5000)),
        ("*:5000", ("::", 5000)),
        ("5000", ("::", 5000)),
        ("0", ("::", 0)),
    ],
)
def test_addresses_have_the_same_forms_in_both_settings(bind: str, address: object) -> None:
    assert settings(f'bind = "{bind}"').address("bind") == address
    assert settings(f'metrics_bind = "{bind}"').address("metrics_bind") == address


def test_bind_may_be_a_port_number() -> None:
    assert settings("bind = 8080").address("bind") == ("::", 8080)
    assert error_of("bind = 80800").endswith("found '80800'")


@pytest.mark.parametrize(
    ("bind", "host"),
    [
        ("0.0.0.0", "0.0.0.0"),
        ("localhost", "localhost"),
        ("cache.example.org", "cache.example.org"),
        ("*", "::"),
        ("::", "::"),
        ("[::]", "::"),
        ("::1", "::1"),
        ("[::1]", "::1"),
        ("fe80::1%eth0", "fe80::1%eth0"),
        ("2001:db8::53", "2001:db8::53"),
        ("2001:db8:0:0:0:0:0:53", "2001:db8::53"),
    ],
)
def test_host_without_a_port_gets_5000_except_for_metrics(bind: str, host: str) -> None:
    assert settings(f'bind = "{bind}"').address("bind") == (host, 5000)
    assert error_of(f'metrics_bind = "{bind}"').endswith(f"found {bind!r} without a port; add one")


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("20G", 20 << 30),
        ("20GiB", 20 << 30),
        ("20 GiB", 20 << 30),
        ("20Gi", 20 << 30),
        ("20g", 20 << 30),
        ("20GB", 20 * 10**9),
        ("20 GB", 20 * 10**9),
        ("20 gb", 20 * 10**9),
        ("1.5T", 3 << 39),
        ("500 kB", 500_000),
        ("1K", 1024),
        ("700B", 700),
        ("1P", 1 << 50),
        ("20000000000", 20 * 10**9),
        ("0", 0),
    ],
)
def test_sizes_have_the_units_of_coreutils(size: str, count: int) -> None:
    assert settings(f"cache_size = '{size}'").cache_bytes == count


def test_size_may_be_a_number_of_bytes() -> None:
    assert settings(f"cache_size = {20 << 30}").cache_bytes == 20 << 30
    assert settings("cache_size = 0").cache_bytes == 0
    assert settings().cache_bytes is None


@pytest.mark.parametrize("size", ["20", "500.5", 20, 1 << 19])
def test_small_size_without_a_unit_is_rejected(size: str | int) -> None:
    message = error_of(f"cache_size = {json.dumps(size)}")
    assert message.endswith(f"found {size}, less than one NAR needs; add a unit")


@pytest.mark.parametrize(
    "size", ["", "G", "20X", "20 Gbit", "-1G", "1,5G", "20  G", "20iB", "1e9", "٣G", "9" * 19 + "P"]
)
def test_malformed_sizes_are_rejected(size: str) -> None:
    assert error_of(f"cache_size = '{size}'").startswith("h.toml:1: cache_size: expected a ")


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [
        ("90", 90),
        ("90s", 90),
        ("90 s", 90),
        ("90 seconds", 90),
        ("5m", 300),
        ("5min", 300),
        ("1h 30min", 5400),
        ("1h30m", 5400),
        ("1.5h", 5400),
        ("1d", 86400),
    ],
)
def test_durations_have_the_units_of_systemd(duration: str, seconds: int) -> None:
    for key in ("keep_alive_timeout", "narinfo_max_age", "shutdown_grace"):
        assert getattr(settings(f"{key} = '{duration}'"), key) == seconds


def test_durations_below_a_second_are_accepted_for_timeouts() -> None:
    assert settings("upstream_timeout = '500ms'").upstream_timeout == 0.5
    assert settings("[[upstream]]\nurl = 'http://a'\ntimeout = '1m'").upstream[0].timeout == 60
    wanted_seconds = 'seconds from 1 to 3600, or a string like "30s", "5m" or "1h 30min"'
    for duration in ("500ms", "2h", "30x", "5M", "5 5", "1m30", "", "-1s"):
        message = error_of(f"header_timeout = '{duration}'")
        assert message == f"h.toml:1: header_timeout: expected {wanted_seconds}, found string '{duration}'"


def test_max_header_size_may_have_a_unit() -> None:
    assert settings("max_header_size = '16K'").max_header_size == 16384
    assert error_of("max_header_size = '17K'").endswith("found string '17K'")


def test_metrics_bind_is_unset_by_default_and_needs_metrics() -> None:
    assert settings().address("metrics_bind") is None
    message = error_of('metrics = false\nmetrics_bind = "[::1]:5001"')
    assert message == "h.toml:2: metrics_bind: set without metrics; remove this or set metrics = true"


@pytest.mark.parametrize(
    "bind",
    ["", ":", "65536", "::1:5000", "::5000", "2001:db8::1:80", "a:http", "*.org:1",
     "[::g]:1", "[1.2.3.4]:1", "a:65536", "a:-1", "a:٣", "a b:1",
     "http://a:1", "unix:", "unix://host/path", "unix:/" + "x" * 107, "unix:/a\\u0000b"],
)  # fmt: skip
def test_malformed_bind_is_rejected(bind: str) -> None:
    assert error_of(f'bind = "{bind}"').startswith(
        'h.toml:1: bind: expected "host:port", "[IPv6]:port", ":port" or "unix:/path"'
    )


@pytest.mark.parametrize("line", ["workers = 1", "zstd.window_log = 10", "zstd.window_log = 27", "zstd.level = 22",
                                  "zstd.level = -7", "max_connections = 0", 'unix_socket_mode = "660"',
                                  'trusted_proxies = ["10.0.0.0/8", "::1", "unix"]'])  # fmt: skip
def test_ranges_include_their_ends(line: str) -> None:
    settings(line)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("workers = 0", "workers: expected an integer from 1 to 1024, found integer 0"),
        ("workers = true", "workers: expected an integer from 1 to 1024, found boolean true"),
        ('workers = "4"', "workers: expected an integer from 1 to 1024, found string '4'"),
        ("workers = 4.0", "workers: expected an integer from 1 to 1024, found float 4.0"),
        ("priority = -1", "priority: expected an integer from 0 to 2147483647, found integer -1"),
        ("cache_size = '20X'", 'cache_size: expected a size like "500M", "20G" or "20GiB" (powers of 1024), "20GB'),
        ("cache_size = true", 'cache_size: expected a string like "500M", "20G" or "20GiB" (powers of 1024), "20GB'),
        ("cache_name = ''", "cache_name: expected one line of 1 to 60 characters"),
        ('cache_name = "two\\nlines"', "cache_name: expected one line of 1 to 60 characters"),
        (f"cache_description = '{'x' * 301}'", "cache_description: expected one line of 1 to 300 characters"),
        ("base_url = 'cache'", 'base_url: expected a string like "https://cache.example.org" or'),
        ("max_connections = -1", "max_connections: expected an integer, 0 or more, found integer -1"),
        ("access_log = 1", "access_log: expected true or false, found integer 1"),
        ('log_level = "no"', 'log_level: expected one of "debug", "error", "info", "warning", found string \'no\''),
        ('sign_key_paths = "a"', "sign_key_paths: expected an array of strings, found string (not shown)"),
        ("bind = 1979-05-27", 'bind: expected "host:port", "[IPv6]:port", ":port" or "unix:/path", found date or time'),
        ("zstd = 3", "zstd: expected a table, found integer 3"),
        ("zstd.level = 23", "zstd.level: expected an integer from -7 to 22, found integer 23"),
        ("zstd.window_log = 9", "zstd.window_log: expected 0, or an integer from 10 to 27, found integer 9"),
        ("zstd.window_log = 28", "zstd.window_log: expected 0, or an integer from 10 to 27, found integer 28"),
        ("unix_socket_mode = 0o660", 'unix_socket_mode: expected a string of three or four octal digits, like "0660"'),
        ('unix_socket_mode = "0668"', "unix_socket_mode: expected a string of three or four octal digits"),
        ('trusted_proxies = ["10.0.0.1/8"]', "trusted_proxies: expected an array of IP addresses, networks like"),
        ('virtual_nix_store = "nix/store"', "virtual_nix_store: expected an absolute path, found 'nix/store'"),
        ('real_nix_store = ""', "real_nix_store: expected a path, found an empty string; name one, or remove this"),
        ('sign_key_paths = [""]', "sign_key_paths: expected a path, found an empty string; name one, or remove this"),
        ('nix_db_path = "a\\u0000b"', "nix_db_path: expected a path"),
        ('cache_dir = "~/cache"', "cache_dir: expected a path, found one that begins with ~, which only shells"),
        ('tls_cert_path = "c"', "tls_cert_path: set without tls_key_path; TLS needs both; set both or none"),
        ('tls_key_path = "k"', "tls_key_path: set without tls_cert_path; TLS needs both; set both or none"),
    ],
)  # fmt: skip
def test_invalid_value_is_reported_with_the_found_and_the_expected_value(line: str, message: str) -> None:
    assert error_of(f"# a comment\n{line}").startswith(f"h.toml:2: {message}")


@pytest.mark.parametrize(
    "pattern",
    ["", "a b", "{a,b}", "a/*", "/nix/store/*", "[ab", "café", f"{'0' * 32}-hello", "hello\\*", "a,b"],
)
@pytest.mark.parametrize("key", ["allow", "deny"])
def test_pattern_that_can_match_no_name_is_rejected(key: str, pattern: str) -> None:
    message = error_of(f"[publish]\n{key} = ['*', {json.dumps(pattern)}]")
    assert message.startswith(f"h.toml:2: publish.{key}: ")
    assert " cannot match any name; a name is a store path without its directory and hash" in message


@pytest.mark.parametrize("pattern", ["*", "hello-?.[0-9]*", "[!a-z]*", "[]]", "[!]]*", "a+b-c.d_e?f=g", "0*", "0" * 32])
def test_valid_patterns_are_accepted(pattern: str) -> None:
    assert settings(f"[publish]\nallow = [{json.dumps(pattern)}]").publish.allow == (pattern,)


def test_nar_compression_zstd_needs_enable_compression() -> None:
    message = error_of("enable_compression = false\nnar_compression = 'zstd'")
    assert message.startswith("h.toml:2: nar_compression: enable_compression = false disables compression; set that ")
    assert settings("enable_compression = false").nar_compression == "auto"


def test_tls_over_a_unix_socket_is_rejected() -> None:
    text = 'bind = "unix:/s"\ntls_cert_path = "c"\ntls_key_path = "k"'
    assert error_of(text).startswith("h.toml:2: tls_cert_path: TLS needs TCP, not a unix socket")


def test_key_without_effect_gives_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    settings("\nmax_connection_rate = 256")
    assert [record.getMessage() for record in caplog.records] == [
        "h.toml:2: max_connection_rate: has no effect in this Harmonia; remove it"
    ]


@pytest.mark.parametrize(
    ("text", "daemon"),
    [
        ("", "/nix/var/nix/daemon-socket/socket"),
        ("nix_db_path = '/guest/var/nix/db/db.sqlite'", "/guest/var/nix/daemon-socket/socket"),
        ("daemon_socket = '/s'", "/s"),
        ("daemon_socket = ''", None),
    ],
)
def test_daemon_socket_defaults_to_the_one_beside_the_database(text: str, daemon: str | None) -> None:
    assert settings(text).daemon == daemon


def test_trailing_slash_of_the_store_directory_is_removed() -> None:
    assert settings('virtual_nix_store = "/nix/store/"').virtual_nix_store == "/nix/store"


# The environment


def test_key_files_are_in_the_order_of_the_rust_harmonia_without_duplicates(caplog: pytest.LogCaptureFixture) -> None:
    text = 'sign_key_paths = ["a", "b"]\nsign_key_path = "c"'
    loaded = settings(text, SIGN_KEY_PATH="d", SIGN_KEY_PATHS=" e \n a\tf ")
    assert loaded.sign_key_paths == ("a", "b", "c", "d", "e", "f")
    assert [record.getMessage() for record in caplog.records] == [
        "h.toml:2: sign_key_path: deprecated; use sign_key_paths",
        "environment variable SIGN_KEY_PATH is deprecated; use SIGN_KEY_PATHS",
    ]


def test_release_is_the_deprecated_name_of_publish(caplog: pytest.LogCaptureFixture) -> None:
    source = Source("priority = 5\n[release]\ndeny = ['secret-*']\n", "h.toml", {})
    assert source.settings().publish == PublishRules(deny=("secret-*",))
    assert [record.getMessage() for record in caplog.records] == ["h.toml:2: release: deprecated; use publish"]
    assert source.origins()["publish.deny"] == "h.toml:3"
    assert error_of("[release]\nallow = []\ndeny = 5").startswith("h.toml:3: publish.deny: expected an array")


@pytest.mark.parametrize("tables", [("release", "publish"), ("publish", "release")])
def test_release_and_publish_together_are_rejected(tables: tuple[str, str]) -> None:
    line = 1 + 2 * tables.index("release")
    assert error_of("".join(f"[{table}]\ndeny = ['a']\n" for table in tables)) == (
        f"h.toml:{line}: release: the old name of publish, which is set, too; keep only publish"
    )


def test_nix_store_dir_overrides_the_file() -> None:
    assert settings('virtual_nix_store = "/a"', NIX_STORE_DIR="/b").virtual_nix_store == "/b"


def test_nix_log_dir_overrides_the_file() -> None:
    assert settings('log_dir = "/a"', NIX_LOG_DIR="/b").logs == "/b"


def test_logs_default_to_the_directory_beside_the_database() -> None:
    assert settings('log_dir = "/a"').logs == "/a"
    assert settings('nix_db_path = "/guest/nix/var/nix/db/db.sqlite"').logs == "/guest/nix/var/log/nix"


def test_empty_variables_count_as_unset() -> None:
    assert settings(SIGN_KEY_PATH="", SIGN_KEY_PATHS="", NIX_STORE_DIR="", NIX_LOG_DIR="") == settings()


@pytest.mark.parametrize("variable", ["CACHE_DIRECTORY", "XDG_CACHE_HOME", "HOME"])
def test_warning_for_the_cache_directory_names_its_variable(
    machine: Machine, caplog: pytest.LogCaptureFixture, variable: str
) -> None:
    file = machine.environ[variable] = str(machine.file("file", ""))
    machine.load()
    [record] = caplog.records
    message = f"environment variable {variable}: cache_dir: {file!r} is not a directory; "
    assert record.getMessage().startswith(message)


def test_error_names_the_variable() -> None:
    message = error_of(NIX_LOG_DIR="a\nb")
    assert message == "environment variable NIX_LOG_DIR: log_dir: expected a path, found something else (not shown)"
    message = error_of('virtual_nix_store = "/a"', NIX_STORE_DIR="b")
    assert message == "environment variable NIX_STORE_DIR: virtual_nix_store: expected an absolute path, found 'b'"


# Places in messages


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("wrokers = 1", "h.toml:1: wrokers: unknown key; did you mean workers?"),
        ("\r\n\r\nwrokers = 1\r\n", "h.toml:3: wrokers"),
        ("# wrokers = 1\n\nwrokers = 1", "h.toml:3: wrokers"),
        ('bind = """\nwrokers = 1\n"""\n"wrokers" = 1', "h.toml:4: wrokers"),
        ("sign_key_paths = [\n  'wrokers = 1', # ]\n]\nwrokers = [\n1]", "h.toml:4: wrokers"),
        ("[zstd]\nlevel = 1\n\nlevl = 1", "h.toml:4: zstd.levl: unknown key; did you mean zstd.level?"),
        ("zstd.level = 1\nzstd.levl = 1", "h.toml:2: zstd.levl"),
        ("zstd = { level = 1, levl = 1 }", "h.toml:1: zstd.levl"),
        ("workers = 1\n[zstd]\nworkers = 1", "h.toml:3: zstd.workers: unknown key; did you mean workers?"),
        ("port = 5000", "h.toml:1: port: unknown key; did you mean bind?"),
        ("host = 'cache'", "h.toml:1: host: unknown key; did you mean bind?"),
        ("listen = '[::]:80'", "h.toml:1: listen: unknown key; did you mean bind?"),
        ("level = 1", "h.toml:1: level: unknown key; did you mean zstd.level?"),
        ("[zstd]\n[zz.b]\nc = 1", "h.toml:2: zz: unknown key; remove it; docs/reference/configuration.md lists them"),
        ('"a\\nb.c" = 1', "h.toml:1: 'a\\nb.c': unknown key"),
        ("workers = 1\nworkers = 2", "h.toml:2: not valid TOML: "),
        ("workers = 1\nunix_socket_mode = 0660", "h.toml:2: not valid TOML: "),
        ("workers = 1\nsign_key_paths = [\n", "h.toml:2: not valid TOML: "),
        ("workers = " + "[" * 9999, "h.toml: not valid TOML: "),
        ("workers = " + "9" * 9999, "h.toml: not valid TOML: "),
    ],
)  # fmt: skip
def test_message_begins_with_file_and_line(text: str, place: str) -> None:
    assert error_of(text).startswith(place)


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("info", "info"),
        ("WARN", "warning"),
        ("trace", "debug"),
        ("off", "error"),
        ("harmonia=debug,actix=warn", "debug"),
        ("warn,harmonia_cache=debug", "debug"),
        ("debug,harmonia_cache=warn", "warning"),
        ("harmonia_cache::nar=info,harmonia_store_db=error", "info"),
        ("debug,actix_web::middleware=debug", "debug"),
        (" info , hyper=off ", "info"),
        ("harmonia", "debug"),
        ("harmonia_cache[request{path=/nar}]=debug", "debug"),
        ("error/some.*pattern", "error"),
        ("actix_web=debug", None),
        ("harmonia=loud", None),
        ("harmonious=debug", None),
        (",=,", None),
        ("", None),
    ],
)
def test_rust_log_sets_the_level(text: str, level: str | None) -> None:
    assert settings(RUST_LOG=text).log_level == (level or "info")
    assert settings('log_level = "warning"', RUST_LOG=text).log_level == "warning"
    origin = Source.read("/dev/null", {"RUST_LOG": text}).origins()["log_level"]
    assert origin == ("environment variable RUST_LOG" if level else "default")


@pytest.mark.parametrize(
    ("file", "variable", "warned"),
    [
        ("", "debug", False),
        ("", "actix_web=debug", True),
        ('log_level = "info"', "debug", True),
        ('log_level = "info"', "", False),
    ],
)
def test_rust_log_without_effect_gives_one_warning(
    machine: Machine, caplog: pytest.LogCaptureFixture, file: str, variable: str, *, warned: bool
) -> None:
    machine.environ["RUST_LOG"] = variable
    machine.load(file)
    messages = [message for message in caplog.messages if "RUST_LOG" in message]
    assert len(messages) == warned


# Files


def test_full_file_of_the_rust_harmonia_is_accepted_unchanged(machine: Machine, pair: tuple[str, str]) -> None:
    machine.file("cert.pem", pair[0])
    machine.file("key.pem", pair[1])
    machine.file("cache.secret")
    machine.file("old.secret", SecretKey.generate("old").export())
    path = machine.file("upstream.toml", RUST_HARMONIA_CONFIG.format(root=machine.root))
    loaded = load(None, {"CONFIG_FILE": str(path)})
    assert (loaded.workers, loaded.priority) == (4, 50)
    assert [key.name for key in secret_keys(loaded)] == ["cache.example.org-1", "old"]


def test_config_option_takes_precedence_over_config_file(machine: Machine) -> None:
    machine.environ["CONFIG_FILE"] = "/nowhere"
    assert machine.load("priority = 7").priority == 7


@pytest.fixture
def system_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set the file that is read without --config and CONFIG_FILE."""
    path = tmp_path / "etc/harmonia.toml"
    path.parent.mkdir()
    monkeypatch.setattr("harmonia.config.loader.SYSTEM_FILE", str(path))
    return path


def test_file_in_etc_has_the_lowest_precedence(machine: Machine, system_file: Path) -> None:
    system_file.write_text("priority = 1")
    assert read(None, {}).priority == 1
    assert read(None, {"CONFIG_FILE": str(machine.file("variable.toml", "priority = 2"))}).priority == 2
    assert read(str(machine.file("option.toml", "priority = 3")), {}).priority == 3
    assert read("/dev/null", {}).priority == 30


def test_setting_of_the_file_in_etc_has_its_line(system_file: Path) -> None:
    system_file.write_text("# mine\npriority = 1")
    assert Source.read(None, {}).origins()["priority"] == f"{system_file}:2"
    system_file.write_text("priority = true")
    with pytest.raises(ConfigError, match=re.escape(f"{system_file}:1: priority: ")):
        read(None, {})


def test_missing_file_in_etc_means_defaults(system_file: Path) -> None:
    assert read(None, {}) == settings()
    system_file.parent.rmdir()
    assert read(None, {}) == settings()
    system_file.parent.touch()
    assert read(None, {}) == settings()


def test_unreadable_file_in_etc_is_an_error(system_file: Path) -> None:
    system_file.mkdir()
    with pytest.raises(ConfigError, match=re.escape(f"cannot read '{system_file}': Is a directory; make it readable,")):
        read(None, {})


def test_defaults_are_checked_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\Aenvironment variable NIX_STORE_DIR: virtual_nix_store: no store at '"):
        load(None, {"NIX_STORE_DIR": str(tmp_path / "none")})


def test_error_for_an_unreadable_file_names_option_or_variable(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\A--config: cannot read '/nowhere': No such file"):
        load("/nowhere", {})
    with pytest.raises(ConfigError, match=r"\Aenvironment variable CONFIG_FILE: cannot read '.*': Is a directory"):
        load(None, {"CONFIG_FILE": str(tmp_path)})


def test_file_that_is_not_utf8_is_reported_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "latin1.toml"
    path.write_bytes(b"workers = 1\n# gr\xfc\xdfe\n")
    with pytest.raises(ConfigError, match=r"latin1\.toml:2: not UTF-8"):
        load(str(path), {})


def test_database_defaults_to_the_one_beside_the_store(machine: Machine) -> None:
    assert machine.load().database == str(machine.database)


def test_database_is_found_beside_a_symlink_to_the_store(machine: Machine) -> None:
    moved = machine.root / "big"
    machine.store.rename(moved)
    machine.store.symlink_to(moved)
    loaded = machine.load()
    assert (loaded.real_store, loaded.database) == (str(moved), str(machine.database))


def test_database_is_found_beside_the_target_of_a_symlink(machine: Machine) -> None:
    link = machine.root / "link"
    link.symlink_to(machine.store)
    loaded = Settings(real_nix_store=f"{link}/")
    assert preflight.check(loaded, {}) == []
    assert (loaded.real_store, loaded.database) == (str(machine.store), str(machine.database))


def test_missing_store_is_reported(machine: Machine) -> None:
    shutil.rmtree(machine.store)
    assert machine.error_of() == (
        "ROOT/harmonia.toml:1: real_nix_store: no store at 'ROOT/nix/store': No such file or directory; "
        "set real_nix_store to its path on disk"
    )


def test_store_that_is_a_file_is_reported(machine: Machine) -> None:
    shutil.rmtree(machine.store)
    machine.store.touch()
    assert "no store at 'ROOT/nix/store': Not a directory" in machine.error_of()


def test_inaccessible_store_is_reported(machine: Machine) -> None:
    loaded = machine.load()
    machine.store.chmod(0)
    user = os.geteuid()
    os.seteuid(user or 65534)  # root can enter every directory
    try:
        with pytest.raises(
            ConfigError, match=r"real_nix_store: cannot enter '.*': Permission denied; let the server's"
        ):
            preflight.check(loaded, {})
    finally:
        os.seteuid(user)


def test_missing_database_is_reported(machine: Machine) -> None:
    machine.database.unlink()
    assert machine.error_of() == (
        "ROOT/harmonia.toml: nix_db_path: cannot read 'ROOT/nix/var/nix/db/db.sqlite': No such file or directory; "
        "set nix_db_path to the store's db.sqlite"
    )


def test_missing_key_file_is_reported_with_its_setting_or_variable(machine: Machine) -> None:
    first, cause = machine.file("a"), "cannot read '/nowhere': No such file"
    assert f"harmonia.toml:3: sign_key_paths: {cause}" in machine.error_of(
        f'sign_key_path = "{first}"\nsign_key_paths = ["/nowhere"]'
    )
    assert f"harmonia.toml:3: sign_key_paths: {cause}" in machine.error_of(
        f'sign_key_paths = ["{first}"]\nsign_key_path = "/nowhere"'
    )
    machine.environ["SIGN_KEY_PATHS"] = f"{first} /nowhere"
    assert machine.error_of().startswith(f"environment variable SIGN_KEY_PATHS: sign_key_paths: {cause}")
    del machine.environ["SIGN_KEY_PATHS"]
    machine.environ["SIGN_KEY_PATH"] = "/nowhere"
    assert machine.error_of().startswith(f"environment variable SIGN_KEY_PATH: sign_key_paths: {cause}")


@pytest.mark.parametrize("content", ["", SECRET[:-9], BASE64, "\0" + BASE64 + ":"])
def test_broken_key_file_is_reported_without_its_content(machine: Machine, content: str) -> None:
    machine.file("k", content)
    message = machine.error_of(f'sign_key_paths = ["{machine.root}/k"]')
    assert message == "ROOT/harmonia.toml:2: sign_key_paths: no secret key in 'ROOT/k'; make one with harmonia keygen"


@pytest.mark.parametrize(
    ("text", "environ"),
    [
        (f'sign_key_paths = ["{SECRET}"]', {}),
        (f'sign_key_paths = ["{SECRET[:-20]}"]', {}),
        (f'sign_key_paths = "{SECRET}"', {}),
        (f'sign_key_paths = [["{SECRET}"]]', {}),
        (f'sign_key_path = "{SECRET}"', {}),
        (f'tls_cert_path = "c"\ntls_key_path = """-----BEGIN PRIVATE KEY-----\n{BASE64}"""', {}),
        ("", {"SIGN_KEY_PATHS": SECRET}),
        ("", {"SIGN_KEY_PATH": SECRET}),
    ],
)
def test_key_instead_of_its_path_is_rejected_and_not_shown(text: str, environ: Mapping[str, str]) -> None:
    message = error_of(text, **environ)
    assert "(not shown)" in message
    assert BASE64[:10] not in message


def test_repr_of_settings_and_keys_has_no_secret(machine: Machine) -> None:
    machine.file("k")
    loaded = machine.load(f'sign_key_paths = ["{machine.root}/k"]')
    assert BASE64[:10] not in repr((loaded, secret_keys(loaded)))


@pytest.mark.parametrize(("mode", "warnings"), [(0o600, 0), (0o400, 0), (0o640, 1), (0o604, 1)])
def test_key_file_accessible_to_others_gives_one_warning(
    machine: Machine, caplog: pytest.LogCaptureFixture, mode: int, warnings: int
) -> None:
    path = machine.file("k", mode=mode)
    machine.load(f'sign_key_paths = ["{path}"]')
    message = f"others than the owner can access the key file {str(path)!r} (mode {mode:04o}); chmod 600 it"
    expected = f"{machine.root}/harmonia.toml:2: sign_key_paths: {message}"
    assert [record.getMessage() for record in caplog.records] == [expected] * warnings
    assert all(record.levelno == logging.WARNING for record in caplog.records)


@pytest.mark.parametrize(("directory", "warnings"), [("credentials", 0), ("credential", 1)])
def test_credentials_of_systemd_give_no_warning(
    machine: Machine, caplog: pytest.LogCaptureFixture, directory: str, warnings: int
) -> None:
    (machine.root / "credentials").mkdir()
    path = machine.file("credentials/k", mode=0o440)
    machine.environ["CREDENTIALS_DIRECTORY"] = str(machine.root / directory)
    machine.load(f'sign_key_paths = ["{path}"]')
    assert len(caplog.records) == warnings


# TLS


def tls(machine: Machine) -> str:
    return f'tls_cert_path = "{machine.root}/cert.pem"\ntls_key_path = "{machine.root}/key.pem"'


def test_matching_certificate_and_key_serve_tls_1_2_or_newer(machine: Machine, pair: tuple[str, str]) -> None:
    machine.file("cert.pem", pair[0])
    machine.file("key.pem", pair[1])
    context = tls_context(machine.load(tls(machine)))
    assert context
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.get_ca_certs() == []


def test_without_a_certificate_there_is_no_tls(machine: Machine) -> None:
    assert tls_context(machine.load()) is None


def test_tls_key_accessible_to_others_gives_a_warning(
    machine: Machine, caplog: pytest.LogCaptureFixture, pair: tuple[str, str]
) -> None:
    machine.file("cert.pem", pair[0], 0o644)
    path = machine.file("key.pem", pair[1], 0o644)
    machine.load(tls(machine))
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]


def openssl(command: str, text: str) -> str:
    return subprocess.run(["openssl", *command.split()], input=text, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no certificate", "2: tls_cert_path: no certificates in 'ROOT/cert.pem' "),
        ("no key", "3: tls_key_path: cannot read a private key in 'ROOT/key.pem'; "),
        ("a passphrase", "3: tls_key_path: cannot read a private key in 'ROOT/key.pem'; "),
        ("another key", "3: tls_key_path: 'ROOT/key.pem' is not the key of the first certificate in 'ROOT/cert.pem'; "),
        ("another of its kind", "3: tls_key_path: 'ROOT/key.pem' is not the key of the first certificate in "),
        ("a weak pair", "2: tls_cert_path: 'ROOT/cert.pem' is too weak for OpenSSL: ee key too small; "),
    ],
)
def test_error_for_certificate_and_key_names_the_faulty_file(
    machine: Machine, pair: tuple[str, str], case: str, message: str
) -> None:
    cert, key = pair
    if case == "no certificate":
        cert = "hello"
    elif case == "no key":
        key = "hello"
    elif case == "another key":
        key = openssl("genpkey -algorithm ED25519", "")
    elif case == "another of its kind":
        key = openssl("genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256", "")
    elif case == "a weak pair":
        key = openssl("genrsa 1024", "")
        cert = openssl("req -x509 -days 2 -subj /CN=localhost -key /dev/stdin", key)
    else:
        key = openssl("pkcs8 -topk8 -passout pass:secret", key)
    machine.file("cert.pem", cert)
    machine.file("key.pem", key)
    assert machine.error_of(tls(machine)).startswith(f"ROOT/harmonia.toml:{message}")


def test_missing_tls_file_is_reported(machine: Machine, pair: tuple[str, str]) -> None:
    machine.file("cert.pem", pair[0])
    assert machine.error_of(tls(machine)).startswith(
        "ROOT/harmonia.toml:3: tls_key_path: cannot read 'ROOT/key.pem': No such file"
    )


def test_settings_survive_pickling(machine: Machine) -> None:
    loaded = machine.load("zstd.level = 3")
    assert pickle.loads(pickle.dumps(loaded)) == loaded


# Upstreams

_KEY = SecretKey.parse(SECRET).public_key


def upstream(*lines: str) -> str:
    return "\n".join(["[[upstream]]", "url = 'https://cache.example.org'", *lines])


def test_upstream_needs_only_its_url() -> None:
    (loaded,) = settings(upstream()).upstream
    assert loaded == Upstream(url="https://cache.example.org")
    assert settings().upstream == ()


def test_upstreams_keep_their_order() -> None:
    text = upstream(f"public_keys = ['{_KEY}']", "sign = true") + "\n[[upstream]]\nurl = 'http://b'\ntimeout = 3"
    first, second = settings(text).upstream
    assert (first.public_keys, first.sign, second.url, second.timeout) == ((str(_KEY),), True, "http://b", 3.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (upstream("prioity = 1"), "h.toml:3: [[upstream]] 1: prioity: unknown key; did you mean priority?"),
        (
            "[[upstream]]\nmode = 'proxy'",
            "h.toml:1: [[upstream]] 1: url: missing; each [[upstream]] needs the URL of a cache",
        ),
        (
            upstream("public_key = 1"),
            "h.toml:3: [[upstream]] 1: public_key: unknown key; did you mean [[upstream]] public_",
        ),
        (upstream("mode = 'push'"), "h.toml:3: [[upstream]] 1: mode: expected one of"),
        (upstream("timeout = 0"), "h.toml:3: [[upstream]] 1: timeout: expected seconds, more than 0"),
        (
            upstream("public_keys = ['x']"),
            "h.toml:3: [[upstream]] 1: public_keys: a public key has the form name:base64",
        ),
        (upstream("sign = true"), "h.toml:3: [[upstream]] 1: sign: set without public_keys;"),
        (upstream("netrc = 'a'", "credentials_file = 'b'"), "h.toml:4: [[upstream]] 1: credentials_file: set together"),
        (upstream() + "\n" + upstream(), "h.toml:4: [[upstream]] 2: url: given twice"),
        ("upstream = 1", "h.toml:1: upstream: expected an array of tables, found integer (not shown); begin"),
        ("upstream = [1]", "h.toml:1: upstream: expected an array of tables, found array"),
        (
            "[upstream]\nurl = 'http://a:b@c'",
            "h.toml:1: upstream: expected an array of tables, found table (not shown); begin each of them",
        ),
    ],
)
def test_invalid_upstream_is_reported(text: str, message: str) -> None:
    assert error_of(text).startswith(message)


@pytest.mark.parametrize(
    "url", ["https://user:sesame@cache.example.org", "ftp://x", "cache.example.org", "https://x/?y"]
)
def test_url_with_a_password_is_not_shown(url: str) -> None:
    message = error_of(f"[[upstream]]\nurl = '{url}'")
    assert message.startswith("h.toml:2: [[upstream]] 1: url: expected a string like")
    assert "sesame" not in message


@pytest.mark.parametrize(
    ("key", "content", "message"),
    [
        ("netrc", None, "cannot read"),
        ("netrc", 'machine cache login a password "b', "cannot use"),
        ("credentials_file", None, "cannot read"),
        ("credentials_file", "no colon", "cannot use"),
        ("credentials_file", ":", "cannot use"),
        ("credentials_file", "a:b\nc", "cannot use"),
        ("ca_file", None, "cannot read"),
        ("ca_file", "no PEM", "cannot read"),
    ],
)
def test_invalid_file_of_an_upstream_is_reported(machine: Machine, key: str, content: str | None, message: str) -> None:
    if content is not None:
        machine.file("file", content)
    error = machine.error_of(upstream(f"{key} = '{machine.root}/file'"))
    assert error.startswith(f"ROOT/harmonia.toml:4: [[upstream]] 1: {key}: {message}")


@pytest.mark.parametrize(
    ("content", "sent"),
    [
        ("me:sesame\n", "Basic bWU6c2VzYW1l"),
        ("me:sesame\r\n", "Basic bWU6c2VzYW1l"),
        (":sesame", "Basic OnNlc2FtZQ=="),
        ("me:", "Basic bWU6"),
        ("me:a:b", "Basic bWU6YTpi"),
        (r"me:a\b", "Basic bWU6YVxi"),
    ],
)
def test_credentials_file_forms(machine: Machine, content: str, sent: str) -> None:
    machine.file("file", content)
    loaded = machine.load(upstream(f"credentials_file = '{machine.root}/file'"))
    assert authorization(loaded, 0) == sent


def test_netrc_without_the_host_of_the_upstream_gives_a_warning(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.file("netrc", "machine other login a password sesame\n")
    loaded = machine.load(upstream(f"netrc = '{machine.root}/netrc'"))
    assert authorization(loaded, 0) is None
    [warning] = caplog.messages
    assert "[[upstream]] 1: netrc: no entry for " in warning
    assert "sesame" not in warning


def test_credentials_are_in_no_repr(machine: Machine) -> None:
    machine.file("file", "me:sesame\n")
    loaded = machine.load(upstream(f"credentials_file = '{machine.root}/file'"))
    assert authorization(loaded, 0) == "Basic bWU6c2VzYW1l"
    assert "sesame" not in repr(loaded)


# Properties

TOP = {
    "bind": st.sampled_from(["[::1]:1", "a.b:2", "unix:/x"]),
    "unix_socket_mode": st.from_regex(r"\A[0-7]{3,4}\Z"),
    "workers": st.integers(1, 1024),
    "max_connections": st.integers(0),
    "shutdown_grace": st.integers(0),
    "max_header_size": st.integers(1024, 16384),
    "header_timeout": st.integers(1, 3600),
    "keep_alive_timeout": st.integers(1, 86400),
    "max_query_rate": st.integers(0),
    "max_failed_auth_rate": st.integers(0),
    "real_nix_store": st.from_regex(r"\A(/[a-zäß \"\\]+)+\Z"),
    "nix_db_path": st.from_regex(r"\A(/[a-zäß \"\\]+)+\Z"),
    "priority": st.integers(0, 2**31 - 1),
    "narinfo_max_age": st.integers(0, 2**31),
    "enable_compression": st.booleans(),
    "trusted_proxies": st.lists(st.one_of(st.ip_addresses().map(str), st.just("unix"))),
    "access_log": st.booleans(),
    "log_level": st.sampled_from(["debug", "info", "warning", "error"]),
}
ZSTD = {
    "level": st.integers(-7, 22),
    "long_distance_matching": st.booleans(),
    "window_log": st.just(0) | st.integers(10, 27),
    "max_ldm_encoders_per_worker": st.integers(0),
}
KEYS = [
    item.name for struct in (Settings, Zstd, Upstream, PublishRules, Push) for item in msgspec.structs.fields(struct)
]


def toml(table: Mapping[str, Any]) -> list[str]:
    """Return a line for each key. The drawn values are written alike in JSON and TOML."""
    return [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items()]


@given(st.fixed_dictionaries({}, optional=TOP), st.fixed_dictionaries({}, optional=ZSTD))
def test_all_valid_values_are_loaded(top: Mapping[str, Any], zstd: Mapping[str, Any]) -> None:
    loaded = msgspec.to_builtins(settings("\n".join([*toml(top), "[zstd]", *toml(zstd)])))
    assert {
        key: list(value) if isinstance(value, tuple) else value for key, value in loaded.items() if key in top
    } == top
    assert {key: value for key, value in loaded["zstd"].items() if key in zstd} == zstd


@given(
    st.fixed_dictionaries({}, optional=TOP),
    st.sampled_from([key for key in KEYS if len(key) > 3]),
    st.data(),
)
def test_misspelt_key_is_reported_with_its_line_and_the_nearest_name(
    top: Mapping[str, Any], key: str, data: st.DataObject
) -> None:
    at = data.draw(st.integers(1, len(key) - 2))
    misspelt = key[:at] + key[at + 1] + key[at] + key[at + 2 :]
    lines = toml(top)
    where = data.draw(st.integers(0, len(lines)))
    lines.insert(where, f"{misspelt} = 1")
    if misspelt in KEYS:
        return
    message = error_of("\n".join(lines))
    assert message.startswith(f"h.toml:{where + 1}: {misspelt}: unknown key; did you mean ")
    assert message.endswith(f"{difflib.get_close_matches(misspelt, KEYS, 1)[0]}?")


TOML = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("1979-05-27"),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.text() | st.dictionaries(st.sampled_from(KEYS) | st.text(), TOML).map(toml).map("\n".join))
def test_arbitrary_text_raises_only_a_one_line_config_error(text: str) -> None:
    try:
        settings(text)
    except ConfigError as error:
        assert re.fullmatch(r"h\.toml(:[0-9]+)?: .+", str(error))  # noqa: PT017  (no error is fine as well)


PUSH = "[push]\nenable = true\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PUSH, "h.toml:2: push.enable: set without tokens_path; "),
        (f"tokens_path = '/t'\n{PUSH}", "h.toml:3: push.enable: tokens would be sent without TLS; "),
        (f"tokens_path = '/t'\nbind = 'unix:/s'\ndaemon_socket = ''\n{PUSH}", "h.toml:5: push.enable: daemon_socket "),
        (
            f"local_store = false\n{PUSH}\n[[upstream]]\nurl = 'http://x'",
            "h.toml:3: push.enable: set together with local_store = false; ",
        ),
        ("tokens_path = '/t'\nanonymous_scopes = ['push']", 'h.toml:2: anonymous_scopes: "push" would let everyone'),
        ("[lan]\npublic_keys = ['cache-1:x']", "h.toml:2: lan.public_keys: "),
        (
            f"[lan]\npublic_keys = ['{_KEY}']\n[publish]\nallow = ['x']",
            "h.toml:3: publish: publish rules do not apply to paths from siblings",
        ),
        (
            "tls_cert_path = '/c'\ntls_key_path = '/k'\n[lan]\nannounce = true",
            "h.toml:4: lan.announce: siblings use plain",
        ),
        ("tokens_path = '/t'\n[lan]\nannounce = true", "h.toml:3: lan.announce: siblings send no token"),
        ("[push]\nclient_certificates = ['ci']", "h.toml:2: push.client_certificates: set without tls_client_ca_path"),
        ("[push]\nmax_nar_size = '64G'", "h.toml:2: push.max_nar_size: more than spool_size"),
        ("max_bulk_rate = 9999", "h.toml:1: max_bulk_rate: less than one request, which may have 10000 paths"),
        ("[push]\nspool_size = 'much'", "h.toml:2: push.spool_size: expected a size "),
        ("[push]\nkeep = 5", "h.toml:2: push.keep: expected seconds, 60 or more"),
        ("[push]\nsign_names = ['/x']", "h.toml:2: push.sign_names: "),
        ("[push]\nsign_key_path = ''", "h.toml:2: push.sign_key_path: expected a path"),
    ],
)
def test_invalid_push_setting_is_an_error_with_its_remedy(text: str, message: str) -> None:
    assert error_of(text).startswith(message)


@pytest.mark.parametrize(
    "text",
    [
        f"tokens_path = '/t'\nbind = 'unix:/s'\n{PUSH}",
        f"tokens_path = '/t'\n{PUSH}allow_without_tls = true",
        f"tokens_path = '/t'\ntls_cert_path = '/c'\ntls_key_path = '/k'\n{PUSH}keep = '90d'",
    ],
)
def test_push_is_allowed_on_a_socket_or_with_tls_or_explicitly_without(text: str) -> None:
    assert settings(text).push.enable


def test_publish_and_upstream_together_are_rejected() -> None:
    text = "[publish]\ndeny = ['secret-*']\n[[upstream]]\nurl = 'http://other:5000'\n"
    with pytest.raises(ConfigError, match=r"^harmonia.toml:1: publish: .*set one or the other"):
        parse(text, "harmonia.toml", {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[watch]\nurl = 'cache'", "h.toml:2: watch.url: expected a string like "),
        ("[watch]\njobs = 0", "h.toml:2: watch.jobs: expected an integer "),
        ("[watch]\nallow = ['/x']", "h.toml:2: watch.allow: "),
        ("[watch]\ndeny = ['/x']", "h.toml:2: watch.deny: "),
        ("[watch]\nnot_signed_by = ['key']", "h.toml:2: watch.not_signed_by: "),
        ("[watch]\ngc_roots = ['result']", "h.toml:2: watch.gc_roots: "),
        ("[watch]\nnetrc = ''", "h.toml:2: watch.netrc: expected a path"),
        ("[watch]\nfilter = 'x'", "h.toml:2: watch.filter: unknown key"),
    ],
)
def test_invalid_watch_setting_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        settings(text)


def test_files_of_watch_are_in_the_directories_of_the_service() -> None:
    environment = {"STATE_DIRECTORY": "/var/lib/w", "RUNTIME_DIRECTORY": "/run/w:/run/x"}
    watch = parse("", "h.toml", environment).watch
    assert (watch.state_dir, watch.socket, watch.metrics_file) == ("/var/lib/w", "/run/w/socket", "/run/w/metrics.prom")
    watch = parse("", "h.toml", {"HOME": "/home/u"}).watch
    assert (watch.state_dir, watch.socket, watch.metrics_file) == ("/home/u/.local/state/harmonia", None, None)

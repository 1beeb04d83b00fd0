"""A configuration for the modules of nixpkgs, the Rust Harmonia or nix-serve keeps its meaning with our module.

The options are those of nixos/modules/services/networking/harmonia.nix in nixpkgs (for Harmonia 3.3, September 2026),
and of nix/module.nix and nix/gc-options.nix in upstream's repository (of the same month). Most combinations are taken
from published configurations.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from harmonia.config import loader
from support.nixos_machine import configured, directives, needs_nix

pytestmark = [pytest.mark.nix, needs_nix]

SAME = None
"""The option keeps its meaning, and gives no warning."""
RENAME = "rename it to services.harmonia"
ONE_KEY = "add the path to signKeyPaths"
NO_DAEMON = "reads the store without a daemon: remove it"
NO_GC = "use nix.gc.automatic, nix.gc.dates and nix.gc.options"
NOT_RUST = "is the Harmonia written in Rust, and is not used: remove it"

CACHE = {
    "enable": ("true", SAME),
    "settings": ('{ bind = "[::1]:8916"; priority = 35; }', SAME),
    "signKeyPath": ('"/secrets/key"', ONE_KEY),
    "signKeyPaths": ('[ "/secrets/one" "/secrets/two" ]', SAME),
}
"""Options of the cache: a value, and a part of the only warning."""
OTHERS = {
    "daemon.enable": ("true", NO_DAEMON),
    "daemon.dbPath": ('"/other/db.sqlite"', NO_DAEMON),
    "daemon.logLevel": ('"debug"', NO_DAEMON),
    "daemon.socketPath": ('"/run/d/socket"', NO_DAEMON),
    "daemon.storeDir": ('"/other/store"', NO_DAEMON),
    "gc.enable": ("true", NO_GC),
    "gc.argv": ('[ "harmonia-gc" ]', NO_GC),
    "gc.automatic": ("true", NO_GC),
    "gc.chunkSize": ("100", NO_GC),
    "gc.dates": ('"weekly"', NO_GC),
    "gc.deleteOlderThan": ('"14d"', NO_GC),
    "gc.ensureFree": ('"50G"', NO_GC),
    "gc.extraArgs": ('[ "--verbose" ]', NO_GC),
    "gc.gcRootsDirs": ('[ "/mnt/extra-roots" ]', NO_GC),
    "gc.keepRecent": ('"1d"', NO_GC),
    "gc.noVacuum": ("true", NO_GC),
    "gc.persistent": ("false", NO_GC),
    "gc.randomizedDelaySec": ('"45min"', NO_GC),
    "gc.of_a_later_version": ("1", NO_GC),
}
"""Options without a counterpart here: a value, and a part of the only warning."""
OPTIONS = {
    **{f"harmonia.{name}": row for name, row in (CACHE | OTHERS).items()},
    **{f"harmonia.cache.{name}": row for name, row in CACHE.items()},
    **{f"harmonia-dev.{name}": (value, RENAME) for name, (value, _) in CACHE.items()},
    **{f"harmonia-dev.cache.{name}": (value, RENAME) for name, (value, _) in CACHE.items()},
    **{f"harmonia-dev.{name}": row for name, row in OTHERS.items()},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("enabled", [True, False], ids=["enabled", "alone"])
def test_foreign_option_is_accepted_and_readable(option: str, *, enabled: bool) -> None:
    value, warning = OPTIONS[option]
    machine = configured(
        "enable = true;" if enabled and not option.endswith(".enable") else "",
        beside=f"services.{option} = {value};",
        read=f"""
          let value = {value}; read = config.services.{option}; in
          {{ inherit value; read = if builtins.isAttrs value then builtins.intersectAttrs value read else read; }}
        """,
    )
    assert machine["read"]["read"] == machine["read"]["value"]
    assert machine["failed"] == []
    if warning is SAME:
        assert machine["warnings"] == []
    else:
        [message] = machine["warnings"]
        assert warning in message


def test_options_without_a_counterpart_have_their_defaults() -> None:
    """Other modules may read them."""
    machine = configured("", read="{ inherit (config.services.harmonia) daemon gc; }")
    assert machine["read"]["daemon"]["socketPath"] == "/run/harmonia-daemon/socket"
    assert machine["read"]["gc"]["automatic"] is machine["read"]["gc"]["enable"] is False
    assert machine["warnings"] == []


def test_one_warning_names_all_remedies() -> None:
    machine = configured(
        "",
        beside="""services.harmonia-dev = {
          daemon.enable = true; gc.automatic = true; cache = { enable = true; signKeyPath = "/secrets/one"; };
        };""",
    )
    assert machine["failed"] == []
    [warning] = machine["warnings"]
    for remedy in (RENAME, ONE_KEY, NO_DAEMON, NO_GC):
        assert remedy in warning


@dataclass(frozen=True)
class Case:
    """A configuration and its meaning."""

    configuration: str
    """Options of NixOS."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of Harmonia, in addition to those of the module."""
    streams: tuple[str, ...] = ("5000",)
    """Addresses on which systemd listens."""
    credentials: tuple[str, ...] = ()
    """Files that systemd passes as credentials."""
    units: Mapping[str, list[str]] = field(default_factory=dict)
    """Lines of the unit files."""
    read: Mapping[str, Any] = field(default_factory=dict)
    """Values of Nix expressions that other modules may read."""
    warnings: tuple[str, ...] = ()
    """A part of each warning."""


KEY = "/run/credentials/harmonia.service/sign-key-{}"
CASES = {
    "flat": Case(
        """services.harmonia = {
          enable = true;
          signKeyPaths = [ "/secrets/one" ];
          settings = { bind = "[::]:5000"; workers = 8; max_connection_rate = 512; priority = 30; };
        };""",
        settings={
            "workers": 8,
            "max_connection_rate": 512,
            "priority": 30,
            "sign_key_paths": [KEY.format(0)],
        },
        credentials=("sign-key-0:/secrets/one",),
    ),
    "flat of 2023, one key": Case(
        'services.harmonia = { enable = true; signKeyPath = "/secrets/one"; };',
        settings={"sign_key_paths": [KEY.format(0)]},
        credentials=("sign-key-0:/secrets/one",),
        warnings=(ONE_KEY,),
    ),
    "cache": Case(
        """services.harmonia.cache = {
          enable = true;
          signKeyPaths = [ "/secrets/one" ];
          settings.bind = "127.0.0.1:5005";
        };""",
        settings={"bind": "127.0.0.1:5005", "sign_key_paths": [KEY.format(0)]},
        streams=("127.0.0.1:5005",),
        credentials=("sign-key-0:/secrets/one",),
        read={
            "config.services.harmonia.enable": True,
            "config.services.harmonia.cache.enable": True,
            "config.services.harmonia.cache.settings.bind": "127.0.0.1:5005",
        },
    ),
    "cache and the daemon": Case(
        "services.harmonia = { cache.enable = true; daemon.enable = true; };",
        warnings=(NO_DAEMON,),
    ),
    "cache and the garbage collector": Case(
        """services.harmonia = {
          cache.enable = true;
          gc = { enable = true; automatic = true; deleteOlderThan = "14d"; keepRecent = "1d"; };
        };
        nix.gc.automatic = !config.services.harmonia.gc.automatic;""",
        read={"config.nix.gc.automatic": False},
        warnings=(NO_GC,),
    ),
    "harmonia-dev": Case(
        """services.harmonia-dev = {
          daemon.enable = true;
          cache = {
            enable = true;
            signKeyPaths = [ "/var/lib/secrets/harmonia.secret" ];
            settings = { bind = "[::]:5000"; workers = 8; priority = 30; };
          };
        };""",
        settings={"workers": 8, "priority": 30, "sign_key_paths": [KEY.format(0)]},
        credentials=("sign-key-0:/var/lib/secrets/harmonia.secret",),
        warnings=(RENAME,),
    ),
    "harmonia-dev, flat": Case(
        "services.harmonia-dev = { enable = true; settings.priority = 60; };",
        settings={"priority": 60},
        warnings=(RENAME,),
    ),
    "several keys": Case(
        """services.harmonia = {
          enable = true;
          signKeyPaths = [ "/secrets/one" "/secrets/two" ];
          settings.sign_key_paths = [ "/secrets/three" ];
        };""",
        settings={"sign_key_paths": [KEY.format(number) for number in range(3)]},
        credentials=("sign-key-0:/secrets/one", "sign-key-1:/secrets/two", "sign-key-2:/secrets/three"),
    ),
    "two modules": Case(
        """imports = [
          { services.harmonia.cache.signKeyPaths = [ "/secrets/one" ]; }
          { services.harmonia.settings.bind = lib.mkDefault "[::1]:8916"; }
          { services.harmonia.settings.priority = lib.mkDefault 41; }
        ];
        services.harmonia.cache.enable = lib.mkIf true true;""",
        settings={"bind": "[::1]:8916", "priority": 41, "sign_key_paths": [KEY.format(0)]},
        streams=("[::1]:8916",),
        credentials=("sign-key-0:/secrets/one",),
    ),
    "an address of a VPN": Case(
        'services.harmonia.cache = { enable = true; settings.bind = "100.64.0.7:5000"; };',
        settings={"bind": "100.64.0.7:5000"},
        streams=("100.64.0.7:5000",),
        units={"FreeBind": ["true"]},
    ),
    "an address of a VPN, and FreeBind by hand": Case(
        """services.harmonia.cache = { enable = true; settings.bind = "100.64.0.7:5000"; };
        systemd.sockets.harmonia.socketConfig.FreeBind = "yes";""",
        settings={"bind": "100.64.0.7:5000"},
        streams=("100.64.0.7:5000",),
        units={"FreeBind": ["yes"]},
    ),
    "an address forced upon the socket": Case(
        """services.harmonia.cache = { enable = true; settings.bind = "127.0.0.1:5005"; };
        systemd.sockets.harmonia.socketConfig.ListenStream = lib.mkForce "127.0.0.1:5006";""",
        settings={"bind": "127.0.0.1:5005"},
        streams=("127.0.0.1:5006",),
    ),
    "a unix socket for nginx": Case(
        """services.harmonia.cache = { enable = true; settings.bind = "unix:///run/harmonia.sock"; };
        systemd.sockets.harmonia.socketConfig = { SocketMode = "0660"; SocketGroup = "nginx"; };
        services.nginx.virtualHosts."c.org".locations."/".proxyPass = "http://unix:/run/harmonia.sock";""",
        settings={"bind": "unix:///run/harmonia.sock"},
        streams=("/run/harmonia.sock",),
        units={"SocketMode": ["0660"], "SocketGroup": ["nginx"]},
    ),
    "behind nginx": Case(
        """services.harmonia.enable = true;
        services.nginx = {
          enable = true;
          virtualHosts."c.org".locations."/".proxyPass = "http://${config.services.harmonia.settings.bind}";
        };""",
        read={'config.services.nginx.virtualHosts."c.org".locations."/".proxyPass': "http://[::]:5000"},
    ),
    "a priority that others read": Case(
        """services.harmonia.enable = true;
        environment.etc.priority.text = toString config.services.harmonia.settings.priority;
        environment.etc.workers.text = toString (config.services.harmonia.settings.workers * 2);""",
        read={"config.environment.etc.priority.text": "50", "config.environment.etc.workers.text": "8"},
    ),
    "users of the Nix daemon": Case(
        """services.harmonia.enable = true;
        nix.settings.allowed-users = [ "@wheel" ];""",
        read={
            "config.nix.settings.allowed-users": ["@wheel"],
            "config.nix.settings.extra-allowed-users": ["harmonia"],
        },
    ),
    "users of the Nix daemon, by hand": Case(
        """services.harmonia.enable = true;
        nix.settings.allowed-users = [ "@wheel" config.systemd.services.harmonia.serviceConfig.User ];""",
        read={"config.nix.settings.allowed-users": ["@wheel", "harmonia"]},
    ),
    "no Nix daemon": Case(
        'services.harmonia = { enable = true; settings.daemon_socket = ""; };',
        settings={"daemon_socket": ""},
        read={"config.nix.settings ? extra-allowed-users": False},
    ),
    "TLS, with files beside the configuration": Case(
        f"""services.harmonia.cache = {{
          enable = true;
          settings = {{ tls_cert_path = {__file__}; tls_key_path = "/secrets/key.pem"; }};
        }};""",
        settings={
            "tls_cert_path": KEY.format(0).replace("sign-key-0", "tls_cert_path"),
            "tls_key_path": KEY.format(0).replace("sign-key-0", "tls_key_path"),
        },
        credentials=("tls_cert_path:/nix/store/", "tls_key_path:/secrets/key.pem"),
    ),
    "another store": Case(
        """services.harmonia.cache = {
          enable = true;
          settings = { real_nix_store = "/mnt/hdd/nix/store"; nix_db_path = "/mnt/hdd/nix/var/nix/db/db.sqlite"; };
        };
        systemd.services.harmonia = { after = [ "mnt-hdd.mount" ]; requires = [ "mnt-hdd.mount" ]; };""",
        settings={
            "real_nix_store": "/mnt/hdd/nix/store",
            "nix_db_path": "/mnt/hdd/nix/var/nix/db/db.sqlite",
        },
        units={"Requires": ["harmonia.socket mnt-hdd.mount"]},
    ),
    "settings of upstream's zstd": Case(
        "services.harmonia = { enable = true; settings.zstd = { level = 6; max_ldm_encoders_per_worker = 2; }; };",
        settings={"zstd": {"level": 6, "max_ldm_encoders_per_worker": 2}},
    ),
    "the package written in Rust": Case(
        """services.harmonia = {
          enable = true;
          package = derivation { name = "harmonia"; system = "x86_64-linux"; builder = "/bin/sh"; }
            // { cargoDeps = "/nix/store/deps"; meta.mainProgram = "harmonia-cache"; };
        };""",
        warnings=(NOT_RUST,),
    ),
    "RUST_LOG": Case(
        """services.harmonia.enable = true;
        systemd.services.harmonia.environment.RUST_LOG = "debug,actix_web::middleware=debug";""",
        units={"Environment": ['"RUST_LOG=debug,actix_web::middleware=debug"']},
    ),
    "SIGN_KEY_PATHS, in a container without credentials": Case(
        """services.harmonia.cache = { enable = true; signKeyPaths = lib.mkForce [ ]; };
        users.users.harmonia = { isSystemUser = true; group = "harmonia"; };
        users.groups.harmonia = { };
        systemd.services.harmonia = {
          serviceConfig.DynamicUser = lib.mkForce false;
          environment.SIGN_KEY_PATHS = lib.mkForce "/var/lib/harmonia/key";
        };""",
        units={"DynamicUser": ["false"], "Environment": ['"SIGN_KEY_PATHS=/var/lib/harmonia/key"']},
    ),
    "a file for commands by hand": Case(
        """services.harmonia.enable = true;
        environment.etc."harmonia/harmonia.toml".source = (pkgs.formats.toml { }).generate "mine" { workers = 9; };""",
        read={
            'builtins.fromJSON config.environment.etc."harmonia/harmonia.toml".source.value': {"workers": 9},
        },
    ),
    "more of the unit": Case(
        """services.harmonia.enable = true;
        systemd.services.harmonia = {
          wants = [ "network-online.target" ];
          serviceConfig = {
            Slice = "ci.slice"; MemoryMax = "2G"; RestartSec = "5s"; TimeoutStopSec = "1min"; ProtectHome = true;
            ReadOnlyPaths = [ "/nix/store" ]; SupplementaryGroups = lib.mkAfter [ ];
          };
          unitConfig.StartLimitIntervalSec = 0;
        };""",
        units={
            "MemoryMax": ["2G"],
            "RestartSec": ["5s"],
            "TimeoutStopSec": ["1min"],
            "StartLimitIntervalSec": ["0"],
        },
    ),
    "a network for the service": Case(
        """services.harmonia.enable = true;
        systemd.services.harmonia.serviceConfig = {
          PrivateNetwork = lib.mkForce false;
          RestrictAddressFamilies = lib.mkForce [ "AF_UNIX" "AF_INET" "AF_INET6" ];
          IPAddressDeny = lib.mkForce "";
        };""",
        units={"RestrictAddressFamilies": ["AF_UNIX", "AF_INET", "AF_INET6"], "PrivateNetwork": ["false"]},
    ),
    "nix-serve": Case(
        """services.harmonia = {
          enable = true;
          openFirewall = true;
          signKeyPaths = [ "/var/cache-priv-key.pem" ];
          settings.bind = "127.0.0.1:5069";
        };""",
        settings={"bind": "127.0.0.1:5069", "sign_key_paths": [KEY.format(0)]},
        streams=("127.0.0.1:5069",),
        credentials=("sign-key-0:/var/cache-priv-key.pem",),
        read={"config.networking.firewall.allowedTCPPorts": [5069]},
    ),
}


def toml(settings: Mapping[str, Any]) -> str:
    """Return settings as TOML."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, dict) else {key: value}
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in flat.items())


@pytest.mark.parametrize("name", CASES)
def test_configuration_keeps_its_meaning(name: str) -> None:
    case = CASES[name]
    read = "".join(f"({expression}) " for expression in case.read)
    machine = configured("", module=f"{{ config, lib, pkgs, ... }}: {{ {case.configuration} }}", read=f"[ {read}]")
    assert machine["failed"] == []
    assert machine["settings"] == {"bind": "[::]:5000", "priority": 50, "workers": 4, **case.settings}
    assert tuple(directives(machine["socket"], "ListenStream")) == case.streams
    loader.parse(toml(machine["settings"]), "harmonia.toml", {})  # as the build of the system does
    handed_over = directives(machine["service"], "LoadCredential")
    assert len(handed_over) == len(case.credentials)
    assert all(map(str.startswith, handed_over, case.credentials))
    for key, values in case.units.items():
        found = directives(machine["service"] + machine["socket"], key)
        assert set(values) <= set(found) if key == "Environment" else found == values
    assert dict(zip(case.read, machine["read"], strict=True)) == case.read
    assert len(machine["warnings"]) == len(case.warnings)
    assert all(part in warning for part, warning in zip(case.warnings, machine["warnings"], strict=True))

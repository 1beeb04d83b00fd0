"""module.nix works as documented."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from harmonia.config.settings import Settings
from support.generated import module_keys
from support.nix_client import NIXES, Client, Nix
from support.nixos_machine import build, configured, directives, needs_nix
from support.pages import ROOT
from support.programs import needs

UNITS = ROOT / "docs/systemd"

EXPOSURE = 0.3
"""The exposure that `systemd-analyze security` reports for the unit: 0 is none, 10 everything."""
EXPOSURE_IN_NETWORK = 1.2
"""The exposure with upstreams, which need the network of the machine."""
EXPOSED = {"SystemCallFilter_resources", "RootDirectoryOrRootImage", "RestrictAddressFamilies_AF_UNIX", "DeviceAllow"}
"""The causes of the exposure; docs/reference/service.md explains them."""

DEFAULTS = {"bind": "[::]:5000", "priority": 50, "workers": 4}
"""Settings that the module always writes."""


def test_every_file_setting_is_passed_as_a_credential() -> None:
    """The files of Nix are excluded, because everyone can read them."""
    known = module_keys(Settings)
    named = {name for name in {**known, **known["upstream"]["keys"]} if re.search("_paths?$|_file$|^netrc$", name)}
    handed_over = {
        name for name, each in {**known, **known["upstream"]["keys"]}.items() if each["type"] in {"file", "files"}
    }
    assert handed_over == named - {"nix_db_path"}


@pytest.mark.nix
@needs_nix
class TestModule:
    def test_module_is_off_by_default(self) -> None:
        machine = configured("")
        assert machine["service"] is machine["socket"] is None
        assert machine["failed"] == machine["warnings"] == machine["ports"] == []

    def test_enable_alone_is_sufficient(self) -> None:
        machine = configured("enable = true;")
        assert machine["failed"] == machine["warnings"] == machine["ports"] == []
        assert machine["settings"] == DEFAULTS
        assert machine["system_file"] == {**DEFAULTS, "cache_dir": "/var/cache/harmonia"}
        assert directives(machine["socket"], "ListenStream") == ["5000"]
        [start] = directives(machine["service"], "ExecStart")
        assert re.fullmatch(
            r"/nix/store/\w+-harmonia-[\d.]+/bin/harmonia --config /nix/store/\w+-harmonia\.toml serve", start
        )
        for key, value in {
            "Type": "notify",
            "WatchdogSec": "30",
            "TimeoutStopSec": "40",
            "DynamicUser": "true",
        }.items():
            assert directives(machine["service"], key) == [value]

    def test_server_needs_no_nix(self) -> None:
        machine = configured("enable = true;", beside="nix.enable = false;")
        assert machine["failed"] == []
        assert "nix-daemon.s" not in machine["service"] + machine["socket"]

    def test_keys_certificates_and_tokens_are_passed_as_credentials(self) -> None:
        machine = configured("""
          enable = true;
          signKeyPaths = [ "/secrets/one" ];
          settings = {
            sign_key_paths = [ "/secrets/two" ];
            sign_key_path = "/secrets/three";
            tls_cert_path = "/secrets/cert.pem";
            tls_key_path = "/secrets/key.pem";
            tls_client_ca_path = "/secrets/clients.pem";
            tokens_path = "/secrets/tokens";
          };
        """)
        assert directives(machine["service"], "LoadCredential") == [
            "sign-key-0:/secrets/one",
            "sign-key-1:/secrets/two",
            "sign-key-2:/secrets/three",
            "tls_cert_path:/secrets/cert.pem",
            "tls_client_ca_path:/secrets/clients.pem",
            "tls_key_path:/secrets/key.pem",
            "tokens_path:/secrets/tokens",
        ]
        at = "/run/credentials/harmonia.service"
        assert machine["settings"] == {
            **DEFAULTS,
            "sign_key_paths": [f"{at}/sign-key-{number}" for number in range(3)],
            "tls_cert_path": f"{at}/tls_cert_path",
            "tls_client_ca_path": f"{at}/tls_client_ca_path",
            "tls_key_path": f"{at}/tls_key_path",
            "tokens_path": f"{at}/tokens_path",
        }
        assert "/secrets" not in re.sub(r"LoadCredential=.*", "", machine["service"])
        assert machine["system_file"] == {
            **DEFAULTS,
            "cache_dir": "/var/cache/harmonia",
            "sign_key_paths": ["/secrets/one", "/secrets/two", "/secrets/three"],
            "tls_cert_path": "/secrets/cert.pem",
            "tls_client_ca_path": "/secrets/clients.pem",
            "tls_key_path": "/secrets/key.pem",
            "tokens_path": "/secrets/tokens",
        }

    def test_secret_key_in_the_store_gives_a_warning(self) -> None:
        path = "/nix/store/00000000000000000000000000000000-key"
        [warning] = configured(f'enable = true; signKeyPaths = [ "{path}" ];')["warnings"]
        assert path in warning

    @pytest.mark.parametrize(
        ("bind", "streams"),
        [
            ("[::]:5001", ["5001"]),
            (":5001", ["5001"]),
            ("*:5001", ["5001"]),
            ("5001", ["5001"]),
            ("::", ["5000"]),
            ("::1", ["[::1]:5000"]),
            ("localhost", ["127.0.0.1:5000", "[::1]:5000"]),
            ("/run/harmonia/socket", ["/run/harmonia/socket"]),
            ("0.0.0.0", ["0.0.0.0:5000"]),
            ("0.0.0.0:80", ["0.0.0.0:80"]),
            ("[::1]:5000", ["[::1]:5000"]),
            ("localhost:5000", ["127.0.0.1:5000", "[::1]:5000"]),
            ("unix:/run/harmonia/socket", ["/run/harmonia/socket"]),
            ("unix:///run/harmonia/socket", ["/run/harmonia/socket"]),
        ],
    )
    def test_socket_unit_listens_on_bind(self, bind: str, streams: list[str]) -> None:
        machine = configured(f'enable = true; settings.bind = "{bind}";')
        assert machine["failed"] == []
        assert directives(machine["socket"], "ListenStream") == streams
        assert directives(machine["socket"], "SocketMode") == (["0666"] if "/run" in bind else [])

    @pytest.mark.parametrize(
        ("configuration", "key"),
        [
            ('settings.bind = "cache.example.org:5000";', "settings.bind"),
            ('settings.cache_dir = "/big/cache";', "settings.cache_dir"),
            ('settings.metrics_bind = "unix:/run/metrics";', "settings.metrics_bind"),
            ('settings.bind = "unix:/run/harmonia/socket"; openFirewall = true;', "openFirewall"),
            (
                'nginx.enable = true; nginx.hostName = "a"; settings = { tls_cert_path = "/c"; tls_key_path = "/k"; };',
                "nginx",
            ),
        ],
    )
    def test_contradictory_options_fail(self, configuration: str, key: str) -> None:
        [message] = configured(f"enable = true; {configuration}")["failed"]
        assert f"services.harmonia.{key}" in message

    def test_open_firewall_opens_the_port_of_bind(self) -> None:
        assert configured('enable = true; openFirewall = true; settings.bind = "[::]:8080";')["ports"] == [8080]

    def test_settings_are_written_unchanged(self) -> None:
        machine = configured(
            'enable = true; cacheSize = "50G"; settings = { workers = 2; zstd.level = 7; shutdown_grace = 5; };'
        )
        assert machine["settings"] == {
            **DEFAULTS,
            "cache_size": "50G",
            "workers": 2,
            "shutdown_grace": 5,
            "zstd": {"level": 7},
        }
        assert directives(machine["service"], "TimeoutStopSec") == ["15"]

    def test_setting_of_the_wrong_type_is_rejected(self) -> None:
        with pytest.raises(AssertionError, match=r"settings\.workers' is not of type|is not of type"):
            configured('enable = true; settings.workers = "many";')

    def test_nginx_option_sets_up_a_proxy(self) -> None:
        machine = configured('enable = true; openFirewall = true; nginx = { enable = true; hostName = "c.org"; };')
        assert machine["failed"] == []
        assert machine["settings"] == {
            **DEFAULTS,
            "bind": "unix:/run/harmonia/socket",
            "trusted_proxies": ["unix"],
        }
        assert machine["ports"] == [80, 443]
        assert directives(machine["socket"], "SocketGroup") == ["nginx"]
        assert directives(machine["socket"], "SocketMode") == ["0660"]
        host = machine["hosts"]["c.org"]
        assert {host[key] for key in ("forceSSL", "enableACME", "http2")} == {True}
        assert machine["upstreams"] == {"harmonia": ["unix:/run/harmonia/socket"]}
        place = host["place"]
        assert place["proxyPass"] == "http://harmonia"
        for line in ("proxy_buffering off;", "proxy_http_version 1.1;", "X-Forwarded-Proto $scheme;"):
            assert line in place["extraConfig"]

    def test_nginx_may_send_cached_files(self) -> None:
        machine = configured(
            'enable = true; nginx = { enable = true; hostName = "c.org"; sendCachedFiles = true; };',
            read="""{
              inherit (config.services.nginx.virtualHosts."c.org") locations;
              inherit (config.systemd.services.nginx) after serviceConfig;
            }""",
        )
        assert machine["settings"]["nginx_location"] == "/harmonia-nar/"
        nginx = machine["read"]
        assert "harmonia.service" in nginx["after"]
        mounts = nginx["serviceConfig"]["BindReadOnlyPaths"]
        assert mounts == ["-/var/cache/private/harmonia/nar:/run/harmonia-nar"]
        asked = 'X-Sendfile-Type "{}";'
        assert asked.format("X-Accel-Redirect") in nginx["locations"]["/"]["extraConfig"]
        assert "alias /run/harmonia-nar/;" in nginx["locations"]["/harmonia-nar/"]["extraConfig"]
        missing = nginx["locations"]["@harmonia-bytes"]
        assert missing["proxyPass"] == "http://harmonia$request_uri"
        assert asked.format("") in missing["extraConfig"]

    def test_push_option_sets_up_keys_state_and_proxy(self) -> None:
        machine = configured("""
          enable = true;
          push = { enable = true; publicKeys = [ "ci-1:key" ]; };
          nginx = { enable = true; hostName = "c.org"; };
          settings = { tokens_path = "/secrets/tokens"; push.sign_key_path = "/secrets/push"; };
        """)
        assert machine["failed"] == []
        at = "/run/credentials/harmonia.service"
        assert machine["settings"]["push"] == {"enable": True, "sign_key_path": f"{at}/push-sign_key_path"}
        assert machine["system_file"]["push"] == {
            "enable": True,
            "sign_key_path": "/secrets/push",
            "state_dir": "/var/lib/harmonia",
        }
        credentials = directives(machine["service"], "LoadCredential")
        assert credentials == ["tokens_path:/secrets/tokens", "push-sign_key_path:/secrets/push"]
        assert directives(machine["service"], "StateDirectory") == ["harmonia"]
        assert "ci-1:key" in machine["nix"]["trusted-public-keys"]
        for line in ("client_max_body_size 0;", "proxy_request_buffering off;"):
            assert line in machine["hosts"]["c.org"]["place"]["extraConfig"]

    def test_watch_option_sets_up_a_service_and_the_hook(self) -> None:
        machine = configured("""
          watch = { enable = true; url = "https://c.org/push"; hook = true; };
          signKeyPaths = [ "/secrets/key" ];
          settings = { zstd.level = 9; priority = 7; watch = { netrc = "/secrets/netrc"; new_paths = false; }; };
        """)
        assert machine["failed"] == []
        assert machine["service"] is machine["socket"] is None  # this machine serves nothing
        unit = machine["watch"]
        [start] = directives(unit, "ExecStart")
        assert re.fullmatch(r"/nix/store/\S+/bin/harmonia --config /nix/store/\w+-harmonia-watch\.toml watch", start)
        assert directives(unit, "LoadCredential") == ["sign-key-0:/secrets/key", "watch-netrc:/secrets/netrc"]
        for key, value in {
            "Type": "notify",
            "WatchdogSec": "60",
            "DynamicUser": "true",
            "StateDirectory": "harmonia-watch",
            "RuntimeDirectory": "harmonia-watch",
        }.items():
            assert directives(unit, key) == [value]
        assert not directives(unit, "CacheDirectory")
        assert machine["nix"]["post-build-hook"].endswith("/bin/harmonia-hook")
        at = "/run/credentials/harmonia-watch.service"
        assert machine["watch_settings"] == {
            "sign_key_paths": [f"{at}/sign-key-0"],
            "watch": {"netrc": f"{at}/watch-netrc", "new_paths": False, "url": "https://c.org/push"},
            "zstd": {"level": 9},
        }

    def test_watch_beside_the_server_uses_its_cache(self) -> None:
        machine = configured(
            'enable = true; watch.enable = true; settings.watch.url = "https://c.org"; settings.watch.jobs = 3;'
        )
        assert machine["failed"] == []
        assert directives(machine["watch"], "CacheDirectory") == ["harmonia"]
        assert directives(machine["watch"], "User") == directives(machine["service"], "User")
        assert machine["settings"] == DEFAULTS
        assert machine["system_file"]["watch"] == {"jobs": 3, "url": "https://c.org"}
        assert "post-build-hook" not in machine["nix"]

    def test_watch_of_the_mirror_gets_the_bucket_and_its_access_key(self) -> None:
        machine = configured("""
          watch = { enable = true; url = "mirror"; };
          settings.mirror = { endpoint = "https://s3.org"; bucket = "cache"; credentials_file = "/secrets/s3"; };
          settings.publish.deny = [ "secret-*" ];
        """)
        assert machine["failed"] == []
        assert directives(machine["watch"], "LoadCredential") == ["mirror-credentials_file:/secrets/s3"]
        assert machine["watch_settings"] == {
            "mirror": {
                "endpoint": "https://s3.org",
                "bucket": "cache",
                "credentials_file": "/run/credentials/harmonia-watch.service/mirror-credentials_file",
            },
            "publish": {"deny": ["secret-*"]},  # for which it does not start
            "watch": {"url": "mirror"},
        }

    @pytest.mark.parametrize(
        ("watch", "message"),
        [
            ("", "watch: set url"),
            ('watch.url = "mirror";', "set settings.mirror.bucket"),
            ('settings.watch = { url = "http://c"; socket = "/s"; };', "watch.socket: systemd"),
        ],
    )
    def test_wrong_watch_option_is_an_error(self, watch: str, message: str) -> None:
        [failed] = configured(f"watch.enable = true; {watch}")["failed"]
        assert message in failed

    def test_access_key_of_the_mirror_is_a_credential(self) -> None:
        machine = configured("""
          enable = true;
          settings.mirror = { endpoint = "https://s3.org"; bucket = "cache"; credentials_file = "/secrets/s3"; };
        """)
        assert machine["failed"] == []
        mirror = {"endpoint": "https://s3.org", "bucket": "cache"}
        at = "/run/credentials/harmonia.service"
        assert machine["settings"]["mirror"] == mirror | {"credentials_file": f"{at}/mirror-credentials_file"}
        assert machine["system_file"]["mirror"] == mirror | {"credentials_file": "/secrets/s3"}
        assert directives(machine["service"], "LoadCredential") == ["mirror-credentials_file:/secrets/s3"]

    @pytest.mark.parametrize(
        ("bind", "upstream"),
        [("127.0.0.1:5000", "127.0.0.1:5000"), ("[::]:5001", "127.0.0.1:5001"), ("localhost:80", "127.0.0.1:80")],
    )
    def test_nginx_over_tcp_is_trusted(self, bind: str, upstream: str) -> None:
        machine = configured(
            f'enable = true; nginx = {{ enable = true; hostName = "c.org"; }}; settings.bind = "{bind}";'
        )
        assert machine["failed"] == []
        assert machine["settings"]["trusted_proxies"] == ["127.0.0.1", "::1"]
        assert machine["upstreams"] == {"harmonia": [upstream]}

    def test_client_caches_set_up_a_client(self) -> None:
        machine = configured('client.caches."https://cache.example.org" = [ "cache.example.org-1:abc=" ];')
        assert machine["service"] is None
        assert set(machine["nix"]["substituters"]) == {"https://cache.example.org", "https://cache.nixos.org/"}
        assert "cache.example.org-1:abc=" in machine["nix"]["trusted-public-keys"]

    def test_accelerate_sets_up_a_harmonia_between_nix_and_its_caches(self) -> None:
        key = "cache.example.org-1:GOTMCXKgN8cX8Q0TODIXpSfxmqCyDGsNnP6DJpTBu2M="
        caches = f'client.caches."https://cache.example.org" = [ "{key}" ];'
        machine = configured(
            f'{caches} client.accelerate = {{ enable = true; netrc = "/etc/nix/netrc"; idleExit = 60; }};',
            read="config.services.harmonia.client.accelerate.configFile.settings",
        )
        assert machine["failed"] == []
        assert machine["service"] is machine["socket"] is None
        substituters = machine["nix"]["substituters"]
        assert substituters[0] == "http://127.0.0.1:5017"
        assert set(substituters[1:]) == {"https://cache.example.org", "https://cache.nixos.org/"}
        assert machine["nix"]["fallback"] is True
        service, unit = machine["accelerate_service"], machine["accelerate_socket"]
        assert directives(unit, "ListenStream") == ["127.0.0.1:5017"]
        assert directives(service, "LoadCredential") == ["netrc:/etc/nix/netrc"]
        assert directives(service, "RestrictAddressFamilies") == ["AF_UNIX", "AF_INET", "AF_INET6"]
        assert directives(service, "WantedBy") == []
        assert directives(service, "WatchdogSec") == ["30"]
        assert [directives(service, f"StartLimit{each}") for each in ("IntervalSec", "Burst")] == [["120"], ["20"]]
        settings = msgspec.convert(machine["read"], Settings)
        assert settings.idle_exit == 60
        assert [(each.url, each.public_keys) for each in settings.upstream] == [("https://cache.example.org", (key,))]

    def test_siblings_need_keys_multicast_and_netlink(self) -> None:
        key = "cache.example.org-1:GOTMCXKgN8cX8Q0TODIXpSfxmqCyDGsNnP6DJpTBu2M="
        caches = f'client.caches."https://cache.example.org" = [ "{key}" ];'
        machine = configured(
            f'{caches} client.accelerate = {{ enable = true; siblingKeys = [ "{key}" ]; }};',
            read="{ lan = config.services.harmonia.client.accelerate.configFile.settings.lan;"
            " ports = config.networking.firewall.allowedUDPPorts; }",
        )
        assert machine["failed"] == []
        assert machine["read"] == {"lan": {"public_keys": [key]}, "ports": [5353]}
        assert "AF_NETLINK" in directives(machine["accelerate_service"], "RestrictAddressFamilies")
        machine = configured(
            "enable = true; openFirewall = true; settings.lan.announce = true;",
            read="config.networking.firewall.allowedUDPPorts",
        )
        assert machine["failed"] == []
        assert machine["read"] == [5353]
        assert machine["system_file"]["lan"] == {"announce": True}
        assert directives(machine["service"], "PrivateNetwork") == ["false"]
        assert "AF_NETLINK" in directives(machine["service"], "RestrictAddressFamilies")
        closed = configured("enable = true; openFirewall = true;", read="config.networking.firewall.allowedUDPPorts")
        assert closed["read"] == []

    def test_accelerate_without_caches_is_an_error(self) -> None:
        assert "there are no caches behind it" in configured("client.accelerate.enable = true;")["failed"][0]

    def test_store_below_home_is_visible_to_the_service(self) -> None:
        machine = configured('enable = true; settings.real_nix_store = "/home/builder/root/nix/store";')
        assert directives(machine["service"], "ProtectHome") == ["tmpfs"]
        assert directives(machine["service"], "RequiresMountsFor") == ["/home/builder/root/nix"]
        assert directives(machine["service"], "BindReadOnlyPaths") == ["/home/builder/root/nix"]
        elsewhere = configured('enable = true; settings.real_nix_store = "/guest/nix/store";')
        assert directives(elsewhere["service"], "ProtectHome") == ["true"]
        assert directives(elsewhere["service"], "BindReadOnlyPaths") == []

    def test_service_has_a_network_only_for_metrics_bind(self) -> None:
        alone = configured("enable = true;")["service"]
        assert directives(alone, "PrivateNetwork") == ["true"]
        assert directives(alone, "RestrictAddressFamilies") == ["AF_UNIX"]
        metrics = configured('enable = true; settings.metrics_bind = "127.0.0.1:5001";')["service"]
        assert directives(metrics, "PrivateNetwork") == ["false"]
        assert directives(metrics, "IPAddressDeny") == []

    def test_service_has_a_network_for_the_bucket_of_the_mirror(self) -> None:
        machine = configured("""
          enable = true;
          settings.mirror = { endpoint = "https://s3.example.org"; bucket = "cache"; };
        """)
        assert directives(machine["service"], "PrivateNetwork") == ["false"]
        assert directives(machine["service"], "IPAddressDeny") == []

    def test_roots_are_written_to_the_bucket_and_old_paths_deleted(self) -> None:
        machine = configured("""
          signKeyPaths = [ "/secrets/key" ];
          settings.mirror = {
            endpoint = "https://s3.example.org";
            bucket = "cache";
            credentials_file = "/secrets/s3";
          };
          mirror = { roots = [ "/run/current-system" "/var/lib/it's" "/r/100%n \\"$HOME" ]; keep = "90d"; };
        """)
        unit = machine["mirror"]
        write, collect = directives(unit, "ExecStart")
        assert write.endswith(r'''mirror "write" "/run/current-system" "/var/lib/it's" "/r/100%%n \"$$HOME"''')
        assert collect.endswith('mirror "gc" "--keep" "90d"')
        assert directives(unit, "LoadCredential") == [
            "sign-key-0:/secrets/key",
            "mirror-credentials_file:/secrets/s3",
        ]
        assert directives(machine["mirror_timer"], "OnCalendar") == ["daily"]
        assert machine["failed"] == []
        assert machine["service"] is None

    def test_mirror_without_a_bucket_is_an_error(self) -> None:
        assert "set settings.mirror.bucket" in configured('mirror.keep = "90d";')["failed"][0]

    def test_percent_sign_in_a_path_is_no_specifier_of_systemd(self) -> None:
        machine = configured("""
          enable = true;
          signKeyPaths = [ "/secrets/1%n" ];
          settings = { bind = "unix:/run/2%n"; real_nix_store = "/home/3%n/store"; push.sign_key_path = "/4%n"; };
          watch = { enable = true; url = "https://c.org"; };
          client.caches."https://c.org" = [ ];
          client.accelerate = { enable = true; netrc = "/secrets/5%n"; };
        """)
        assert directives(machine["socket"], "ListenStream") == ["/run/2%%n"]
        assert directives(machine["service"], "LoadCredential") == [
            "sign-key-0:/secrets/1%%n",
            "push-sign_key_path:/4%%n",
        ]
        for unit in (machine["service"], machine["watch"]):
            assert directives(unit, "RequiresMountsFor") == ["/home/3%%n"]
            assert directives(unit, "BindReadOnlyPaths") == ["/home/3%%n"]
        assert directives(machine["watch"], "LoadCredential") == ["sign-key-0:/secrets/1%%n"]
        assert directives(machine["accelerate_service"], "LoadCredential") == ["netrc:/secrets/5%%n"]
        assert machine["settings"]["real_nix_store"] == "/home/3%n/store"

    def test_service_has_a_network_for_upstreams(self) -> None:
        machine = configured("""
          enable = true;
          settings.upstream = [
            { url = "https://cache.nixos.org"; }
            { url = "https://private.example.org"; credentials_file = "/secrets/password"; }
          ];
        """)
        assert directives(machine["service"], "PrivateNetwork") == ["false"]
        assert directives(machine["service"], "LoadCredential") == ["upstream-1-credentials_file:/secrets/password"]
        first, second = machine["settings"]["upstream"]
        assert first == {"url": "https://cache.nixos.org"}
        assert second["credentials_file"] == "/run/credentials/harmonia.service/upstream-1-credentials_file"
        assert machine["system_file"]["upstream"] == [
            {"url": "https://cache.nixos.org"},
            {"url": "https://private.example.org", "credentials_file": "/secrets/password"},
        ]

    def test_service_has_no_capability(self) -> None:
        service = configured("enable = true;")["service"]
        assert directives(service, "CapabilityBoundingSet") == directives(service, "AmbientCapabilities") == [""]

    @needs("systemd-analyze")
    def test_exposure_does_not_increase(self, tmp_path: Path) -> None:
        unit = tmp_path / "harmonia.service"
        guide = (ROOT / "docs/reference/service.md").read_text()

        def security(*options: str) -> str:
            return subprocess.check_output(
                ["systemd-analyze", "security", "--offline=yes", "--no-pager", *options, str(unit)], text=True
            )

        unit.write_text(configured('enable = true; signKeyPaths = [ "/secrets/one" ];')["service"])
        assert {each["json_field"] for each in json.loads(security("--json=short")) if each["exposure"]} == EXPOSED
        assert f"harmonia.service: {EXPOSURE} " in security()
        assert f"exposure level of {EXPOSURE} " in guide
        unit.write_text(configured('enable = true; settings.upstream = [ { url = "http://origin"; } ];')["service"])
        assert f"harmonia.service: {EXPOSURE_IN_NETWORK} " in security()
        assert f"the level is {EXPOSURE_IN_NETWORK}." in guide


@pytest.mark.nix
@needs_nix
class TestSettingsCheckAtBuildTime:
    """Nix builds the file, in a store of its own, with this Harmonia."""

    def build(self, settings: str, store: Path) -> subprocess.CompletedProcess[str]:
        expression = f"""
          let
            world = import {ROOT}/nixos-tests/eval {{ nixpkgs = ""; }};
            package = world.pkgs.writeShellScriptBin "harmonia" ''
              export PYTHONPATH={ROOT}
              exec {sys.executable} -m harmonia "$@"
            '';
          in
          (world.configure {{ services.harmonia = {{ enable = true; inherit package; {settings} }}; }})
          .services.harmonia.configFile
        """
        return build(expression, store)

    def test_valid_settings_are_the_file_of_the_service(self, tmp_path: Path) -> None:
        built = self.build(
            'settings = { priority = 35; zstd.level = 7; trusted_proxies = [ "unix" ]; base_url = "http://c"; };',
            tmp_path,
        )
        assert built.returncode == 0, built.stderr
        text = Path(built.stdout.strip()).read_text()
        assert tomllib.loads(text) == {
            **DEFAULTS,
            "priority": 35,
            "zstd": {"level": 7},
            "trusted_proxies": ["unix"],
            "base_url": "http://c",
        }

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ("settings.worker = 2;", "did you mean workers?"),
            ('settings.tls_cert_path = "/secrets/cert.pem";', "set without tls_key_path"),
            ('cacheSize = "lots";', "cache_size: expected"),
        ],
    )
    def test_invalid_settings_fail_the_build(self, tmp_path: Path, settings: str, message: str) -> None:
        built = self.build(settings, tmp_path)
        assert built.returncode != 0
        assert message in built.stderr


@pytest.mark.nix
@needs_nix
def test_lock_and_flake_name_the_same_nixpkgs() -> None:
    """No tool here can renew the lock file, which is JSON, so pin and flake.nix must agree."""
    lock = json.loads((ROOT / "flake.lock").read_text())
    node = lock["nodes"][lock["nodes"]["root"]["inputs"]["nixpkgs"]]
    asked = node["original"]
    assert f'"github:{asked["owner"]}/{asked["repo"]}/{asked["ref"]}"' in (ROOT / "flake.nix").read_text()
    assert re.fullmatch(r"[0-9a-f]{40}", node["locked"]["rev"])
    assert re.fullmatch(r"sha256-[A-Za-z0-9+/]{43}=", node["locked"]["narHash"])
    date = datetime.fromtimestamp(node["locked"]["lastModified"], UTC).date()
    pinned = f"the branch {asked['ref']} of nixpkgs at revision {node['locked']['rev'][:12]} of {date}"
    assert pinned in (ROOT / "docs/reference/nixos-tests.md").read_text()


@pytest.mark.newer_nix
@pytest.mark.parametrize("newer", NIXES[1:], ids=lambda nix: nix.name)
def test_flake_check_passes(newer: Nix, tmp_path: Path) -> None:
    """Nix 2.8 does not support relative `path:`, so newer versions run it."""
    if newer.missing is not None:
        pytest.skip(newer.missing)
    client = Client(newer, tmp_path / "client")
    client.settings["experimental-features"] = "nix-command flakes"
    copy = tmp_path / "project"
    copy.mkdir()
    for name in ("harmonia", "nix", "nixos-tests", "tests", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("flake.nix", "flake.lock", "module.nix", "package.nix", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    stand_in = ("--override-input", "nixpkgs", f"path:{copy}/nixos-tests/eval", "--no-write-lock-file")
    client.run("nix", "flake", "check", "--no-build", "--all-systems", *stand_in, f"path:{copy}", timeout=300)
    names = client.run(
        "nix", "eval", "--json", *stand_in, f"path:{copy}#checks.aarch64-linux", "--apply", "builtins.attrNames"
    )
    tests = {file.stem for file in (ROOT / "nixos-tests").glob("*.nix")}
    assert {"lints", "module", "package", "pytest"} | tests == set(json.loads(names.text))
    assert tests

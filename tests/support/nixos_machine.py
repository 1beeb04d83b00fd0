"""NixOS machines with our module, evaluated by the Nix on this machine.

The configuration uses our own small NixOS in nixos-tests/eval, or the real one if $NIXPKGS names a nixpkgs tree.
"""

import json
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.pages import ROOT
from support.programs import needs

needs_nix = needs("nix-instantiate")
Machine = Mapping[str, Any]


def nix(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of Nix with these variables added to a minimal environment."""
    inherited = {name: os.environ[name] for name in ("PATH", "NIXPKGS", "HOME") if name in os.environ}
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=300, env={**inherited, **environment}
    )


def evaluate(expression: str) -> Any:
    """Return the value of a Nix expression."""
    # The dummy store keeps nothing, so neither a daemon nor write access is needed.
    found = nix(
        "nix-instantiate", "--eval", "--strict", "--json", "--show-trace", "--expr", expression, NIX_REMOTE="dummy://"
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def build(expression: str, store: Path) -> subprocess.CompletedProcess[str]:
    """Build a Nix expression without a sandbox, in a Nix store of its own below the directory `store`."""
    directories = {"NIX_STORE_DIR": "store", "NIX_STATE_DIR": "state", "NIX_LOG_DIR": "log", "NIX_CONF_DIR": "etc"}
    return nix(
        "nix-build",
        "--no-out-link",
        "--expr",
        expression,
        NIX_CONFIG="sandbox = false\nbuild-users-group =\nsubstituters =\n",
        **{name: f"{store}/{directory}" for name, directory in directories.items()},
    )


def configured(
    configuration: str, *, beside: str = "", module: str = "{ }", read: str = "null", arguments: str = ""
) -> Machine:
    """Return our part of a machine with `configuration`, with options `beside` services.harmonia, and a module.

    `read` is a Nix expression that may read `config`, `arguments` are those of nixos-tests/eval.
    """
    machine: Machine = evaluate(f"""
      let
        config = (import {ROOT}/nixos-tests/eval {{ {arguments} }}).configure {{
          imports = [ ({module}) ];
          services.harmonia = {{ {configuration} }};
          boot.isContainer = true;
          security.acme = {{ acceptTerms = true; defaults.email = "root@example.org"; }};
          system.stateVersion = "25.05";
          {beside}
        }};
        text = name: config.systemd.units.${{name}}.text or null;
      in
      {{
        service = text "harmonia.service";
        socket = text "harmonia.socket";
        mirror = text "harmonia-mirror.service";
        mirror_timer = text "harmonia-mirror.timer";
        watch = text "harmonia-watch.service";
        watch_settings = config.services.harmonia.watch.configFile.settings;
        accelerate_service = text "harmonia-accelerate.service";
        accelerate_socket = text "harmonia-accelerate.socket";
        settings = config.services.harmonia.configFile.settings;
        system_file =
          let file = config.environment.etc."harmonia/harmonia.toml" or null; in
          if file == null then null else builtins.fromJSON (builtins.unsafeDiscardStringContext file.source.value);
        ports = config.networking.firewall.allowedTCPPorts;
        nix = builtins.intersectAttrs {{
          substituters = 1; fallback = 1; trusted-public-keys = 1; extra-allowed-users = 1; post-build-hook = 1;
        }} (
          if config.nix.enable then config.nix.settings else {{ }});
        inherit (config) warnings;
        failed = map (each: each.message) (builtins.filter (each: !each.assertion) config.assertions);
        hosts = builtins.mapAttrs (_: host: {{
          inherit (host) enableACME forceSSL http2;
          place = {{ inherit (host.locations."/") extraConfig proxyPass; }};
        }}) config.services.nginx.virtualHosts;
        upstreams = builtins.mapAttrs (_: each: builtins.attrNames each.servers) config.services.nginx.upstreams;
        read = {read};
      }}
    """)
    return machine


def directives(unit: str, key: str) -> list[str]:
    """Return the values of a key in a unit file."""
    return re.findall(rf"^{key}=(.*)$", unit, re.MULTILINE)

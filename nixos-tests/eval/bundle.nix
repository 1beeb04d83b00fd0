# Bundle of a test for Debian machines: the test script, and the configuration of each machine beyond an empty one. The
# closure of the bundle has all store paths that the machines need.
{
  lib,
  pkgs,
  own,
}:
{
  name,
  nodes,
  testScript,
}:
let
  node = config: {
    addresses = {
      v4 = config.networking.primaryIPAddress;
      v6 = config.networking.primaryIPv6Address;
    };
    units =
      lib.mapAttrs
        (file: unit: {
          file = "${unit.unit}/${file}";
          inherit (unit) wantedBy requiredBy;
          aliases = unit.aliases or [ ];
        })
        (
          lib.filterAttrs (
            file: unit:
            unit.enable
            && own {
              kind = "unit";
              name = file;
              text = unit.text;
            }
          ) config.systemd.units
        );
    etc =
      lib.mapAttrs'
        (
          _: entry:
          lib.nameValuePair entry.target {
            source = "${entry.source}";
            inherit (entry) mode user group;
          }
        )
        (
          lib.filterAttrs (
            _: entry:
            entry.enable
            && own {
              kind = "etc";
              name = entry.target;
              text = "${entry.source}";
            }
          ) config.environment.etc
        );
    users =
      lib.mapAttrsToList
        (_: user: {
          inherit (user)
            name
            uid
            group
            extraGroups
            home
            createHome
            isNormalUser
            ;
        })
        (
          lib.filterAttrs (
            name: _:
            own {
              kind = "user";
              inherit name;
            }
          ) config.users.users
        );
    groups = builtins.filter (
      name:
      own {
        kind = "group";
        inherit name;
      }
    ) (builtins.attrNames config.users.groups);
    packages = builtins.filter (
      path:
      own {
        kind = "package";
        name = path;
      }
    ) (map (package: "${package}") config.environment.systemPackages);
    paths = map (path: "${path}") (
      config.system.extraDependencies ++ config.virtualisation.additionalPaths or [ ]
    );
    hosts =
      lib.concatStrings (
        lib.mapAttrsToList (address: names: "${address} ${toString names}\n") config.networking.hosts
      )
      + config.networking.extraHosts;
    ports = config.networking.firewall.allowedTCPPorts;
    activation = lib.mapAttrsToList (_: script: script.text or script) (
      lib.filterAttrs (
        name: _:
        name != "script"
        && own {
          kind = "activation";
          inherit name;
        }
      ) config.system.activationScripts
    );
    tmpfiles = builtins.filter (
      rule:
      own {
        kind = "tmpfiles";
        name = rule;
      }
    ) config.systemd.tmpfiles.rules;
    failed = map (each: each.message) (builtins.filter (each: !each.assertion) config.assertions);
    inherit (config) warnings;
  };
in
pkgs.writeTextFile {
  name = "bundle-${name}";
  destination = "/bundle.json";
  text = builtins.toJSON {
    inherit name testScript;
    nodes = lib.mapAttrs (_: node) nodes;
  };
}

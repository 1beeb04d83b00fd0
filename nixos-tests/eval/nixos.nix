# The part of NixOS that module.nix and the machines of the tests touch: systemd units, users, /etc, nix.conf, nginx,
# open ports. Unit files have the same text as on NixOS. Options in `ignored` are accepted and have no effect.
{ lib, pkgs }:
let
  inherit (lib)
    concatMapStrings
    filterAttrs
    mapAttrs
    mapAttrsToList
    mkDefault
    mkIf
    mkOption
    optional
    optionalAttrs
    optionalString
    types
    ;

  ignored = [
    "boot"
    "documentation"
    "fileSystems"
    "i18n"
    "nixpkgs"
    "programs"
    "security"
    "swapDevices"
    "time"
  ];

  option = type: default: mkOption { inherit type default; };
  anything = option types.anything;
  strings = option (types.listOf types.str) [ ];
  bool = option types.bool;
  attributes = option (types.attrsOf types.anything) { };

  word = value: if builtins.isBool value then lib.boolToString value else toString value;
  # `Key=value` lines. A list gives one line per element, null gives none.
  section =
    settings:
    lib.concatStrings (
      mapAttrsToList (
        key: value:
        concatMapStrings (one: optionalString (one != null) "${key}=${word one}\n") (lib.toList value)
      ) settings
    );

  lists = {
    after = "After";
    before = "Before";
    bindsTo = "BindsTo";
    conflicts = "Conflicts";
    documentation = "Documentation";
    onFailure = "OnFailure";
    partOf = "PartOf";
    requires = "Requires";
    wants = "Wants";
  };
  scripts = {
    script = "ExecStart";
    preStart = "ExecStartPre";
    postStart = "ExecStartPost";
    preStop = "ExecStop";
    postStop = "ExecStopPost";
    reload = "ExecReload";
  };

  unit = types.submodule {
    options =
      mapAttrs (_: _: strings) lists
      // mapAttrs (_: _: option types.lines "") scripts
      // {
        enable = bool true;
        description = option types.str "";
        wantedBy = strings;
        requiredBy = strings;
        aliases = strings;
        unitConfig = attributes;
        serviceConfig = attributes;
        socketConfig = attributes;
        timerConfig = attributes;
        pathConfig = attributes;
        listenStreams = strings;
        listenDatagrams = strings;
        environment = attributes;
        path = option (types.listOf (types.either types.package types.str)) [ ];
        startLimitBurst = option (types.nullOr types.int) null;
        startLimitIntervalSec = option (types.nullOr types.int) null;
        restartTriggers = anything [ ];
        reloadTriggers = anything [ ];
        restartIfChanged = bool true;
        reloadIfChanged = bool false;
        stopIfChanged = bool true;
      };
  };

  unitSection =
    unit:
    mapAttrs (_: toString) (
      filterAttrs (_: list: list != [ ]) (
        lib.mapAttrs' (name: key: lib.nameValuePair key unit.${name}) lists
      )
    )
    // optionalAttrs (unit.description != "") { Description = unit.description; }
    // optionalAttrs (unit.startLimitBurst != null) { StartLimitBurst = unit.startLimitBurst; }
    // optionalAttrs (unit.startLimitIntervalSec != null) {
      StartLimitIntervalSec = unit.startLimitIntervalSec;
    }
    // unit.unitConfig;

  serviceSection =
    name: unit:
    let
      path = unit.path ++ [
        pkgs.coreutils
        pkgs.findutils
        pkgs.gnugrep
        pkgs.gnused
        pkgs.systemd
      ];
      environment = {
        PATH = "${lib.makeBinPath path}:${lib.makeSearchPath "sbin" path}";
        TZDIR = "${pkgs.tzdata}/share/zoneinfo";
      }
      // unit.environment;
      written = filterAttrs (key: _: unit.${key} != "") scripts;
      commands = lib.mapAttrs' (
        key: directive:
        lib.nameValuePair directive (
          [ "${pkgs.writeShellScript "unit-script-${name}-${key}" "set -e\n\n${unit.${key}}"}" ]
          ++ lib.toList (unit.serviceConfig.${directive} or [ ])
        )
      ) written;
    in
    lib.concatStrings (
      mapAttrsToList (key: value: "Environment=${builtins.toJSON "${key}=${toString value}"}\n") (
        filterAttrs (_: value: value != null) environment
      )
    )
    + section (unit.serviceConfig // commands);

  text = suffix: name: unit: ''
    [Unit]
    ${section (unitSection unit)}${
      {
        service = "\n[Service]\n" + serviceSection name unit;
        socket =
          "\n[Socket]\n"
          + section unit.socketConfig
          + section {
            ListenStream = unit.listenStreams;
            ListenDatagram = unit.listenDatagrams;
          };
        timer = "\n[Timer]\n" + section unit.timerConfig;
        path = "\n[Path]\n" + section unit.pathConfig;
        target = "";
      }
      .${suffix}
    }${
      optionalString (unit.wantedBy ++ unit.requiredBy != [ ]) (
        "\n[Install]\n"
        + section (
          optionalAttrs (unit.requiredBy != [ ]) { RequiredBy = toString unit.requiredBy; }
          // optionalAttrs (unit.wantedBy != [ ]) { WantedBy = toString unit.wantedBy; }
        )
      )
    }'';

  # Subset of nixpkgs' `utils`: arguments that systemd passes on as they are (systemd.service(5), "Command lines").
  utils.escapeSystemdExecArgs = lib.concatMapStringsSep " " (
    argument: builtins.replaceStrings [ "%" "$" ] [ "%%" "$$" ] (builtins.toJSON argument)
  );

  suffixes = {
    services = "service";
    sockets = "socket";
    timers = "timer";
    paths = "path";
    targets = "target";
  };

  base =
    { config, name, ... }:
    {
      imports = [ ./nginx.nix ];
      options = lib.genAttrs ignored (_: anything { }) // {
        assertions = anything [ ];
        warnings = strings;
        virtualisation = anything { };
        systemd = mapAttrs (_: _: option (types.attrsOf unit) { }) suffixes // {
          tmpfiles.rules = strings;
          tmpfiles.settings = anything { };
          units = anything { };
        };
        environment = {
          systemPackages = option (types.listOf types.package) [ ];
          variables = anything { };
          etc = mkOption {
            default = { };
            type = types.attrsOf (
              types.submodule (
                { name, config, ... }:
                {
                  options = {
                    enable = bool true;
                    target = option types.str name;
                    text = option (types.nullOr types.lines) null;
                    source = mkOption { type = types.path; };
                    mode = option types.str "symlink";
                    user = option types.str "+0";
                    group = option types.str "+0";
                  };
                  config.source = mkIf (config.text != null) (
                    mkDefault (pkgs.writeText "etc-${lib.strings.sanitizeDerivationName name}" config.text)
                  );
                }
              )
            );
          };
        };
        networking = {
          hostName = option types.str name;
          primaryIPAddress = option types.str "127.0.0.1";
          primaryIPv6Address = option types.str "::1";
          hosts = option (types.attrsOf (types.listOf types.str)) { };
          extraHosts = option types.lines "";
          firewall = {
            enable = bool true;
            allowedTCPPorts = option (types.listOf types.port) [ ];
            allowedUDPPorts = option (types.listOf types.port) [ ];
          };
          interfaces = anything { };
          useDHCP = anything false;
        };
        nix = {
          enable = bool true;
          package = option types.package pkgs.nix;
          extraOptions = option types.lines "";
          settings = attributes;
          gc = anything { };
        };
        users = {
          users = mkOption {
            default = { };
            type = types.attrsOf (
              types.submodule (
                { name, config, ... }:
                {
                  freeformType = types.anything;
                  options = {
                    name = option types.str name;
                    uid = anything null;
                    isNormalUser = bool false;
                    isSystemUser = bool false;
                    group = option types.str (if config.isNormalUser then "users" else "");
                    extraGroups = strings;
                    home = option types.path (if config.isNormalUser then "/home/${name}" else "/var/empty");
                    createHome = bool config.isNormalUser;
                  };
                }
              )
            );
          };
          groups = option (types.attrsOf types.attrs) { };
        };
        system = {
          extraDependencies = option (types.listOf types.path) [ ];
          activationScripts = attributes;
          stateVersion = anything "26.05";
          build = anything { };
        };
      };
      config = {
        system.build.toplevel =
          let
            failed = builtins.filter (each: !each.assertion) config.assertions;
          in
          if failed == [ ] then pkgs.shim "nixos-system" else throw (lib.head failed).message;
        nix.settings = {
          trusted-users = [ "root" ];
          allowed-users = mkDefault [ "*" ];
          require-sigs = mkDefault true;
          substituters = lib.mkAfter [ "https://cache.nixos.org/" ];
          trusted-public-keys = [ "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=" ];
        };
        environment.etc = optionalAttrs config.nix.enable {
          "nix/nix.conf".text =
            concatMapStrings (line: line + "\n") (
              mapAttrsToList (
                key: value: "${key} = ${if builtins.isList value then toString value else word value}"
              ) config.nix.settings
            )
            + config.nix.extraOptions;
        };
        systemd.units = lib.concatMapAttrs (
          kind: suffix:
          lib.mapAttrs' (
            name: unit:
            let
              file = "${name}.${suffix}";
              content = text suffix name unit;
            in
            lib.nameValuePair file {
              inherit (unit)
                enable
                wantedBy
                requiredBy
                aliases
                ;
              text = content;
              unit = pkgs.writeTextFile {
                name = "unit-${lib.strings.sanitizeDerivationName file}";
                destination = "/${file}";
                text = content;
              };
            }
          ) config.systemd.${kind}
        ) suffixes;
      };
    };

  evaluate =
    name: modules:
    lib.evalModules {
      modules = [ base ] ++ modules;
      specialArgs = { inherit pkgs name utils; };
    };
  evalConfig = name: modules: (evaluate name modules).config;

  # Machines and script of a test, from the arguments of pkgs.testers.runNixOSTest.
  evalTest =
    test:
    let
      call =
        module:
        if builtins.isPath module then
          call (import module)
        else if lib.isFunction module then
          module { inherit lib pkgs; }
        else
          module;
      parts =
        module:
        let
          called = call module;
        in
        lib.concatMap parts (called.imports or [ ]) ++ [ called ];
      modules = parts test;
      merged = lib.mergeAttrsList modules;
      names = builtins.attrNames merged.nodes;
      addresses = lib.listToAttrs (
        lib.imap1 (
          number: name:
          lib.nameValuePair name {
            v4 = "192.168.1.${toString number}";
            v6 = "2001:db8:1::${toString number}";
          }
        ) names
      );
      nodes = mapAttrs (
        name: node:
        evalConfig name (
          [
            node
            {
              networking.primaryIPAddress = addresses.${name}.v4;
              networking.primaryIPv6Address = addresses.${name}.v6;
              networking.hosts."127.0.0.2" = [ name ];
              networking.extraHosts = lib.concatMapStrings (
                other: "${addresses.${other}.v4} ${other}\n${addresses.${other}.v6} ${other}\n"
              ) names;
            }
          ]
          ++ lib.concatMap (module: optional (module ? defaults) module.defaults) modules
        )
      ) merged.nodes;
    in
    {
      inherit (merged) name;
      inherit nodes;
      testScript =
        if lib.isFunction merged.testScript then
          merged.testScript { inherit nodes; }
        else
          merged.testScript;
    };
in
{
  inherit evalConfig evalTest;
  evalOptions = modules: (evaluate "machine" modules).options;
  # A Debian machine has none of these paths.
  own = _: true;
}

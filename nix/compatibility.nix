# Compatibility with the options of nixpkgs' module (`harmonia`, `harmonia.cache`) and of the module in the flake of the
# Rust Harmonia (`harmonia-dev`, `harmonia-dev.cache`). A single warning lists the remedies for all old options.
{
  config,
  lib,
  options,
  ...
}:
let
  inherit (lib) mkOption types;
  cfg = config.services.harmonia;

  aliases =
    layout:
    map (name: layout ++ [ name ]) [
      "enable"
      "package"
      "settings"
      "signKeyPath"
      "signKeyPaths"
    ];
  ofNixpkgs = aliases [
    "harmonia"
    "cache"
  ];
  ofUpstream =
    aliases [ "harmonia-dev" ]
    ++ aliases [
      "harmonia-dev"
      "cache"
    ];
  isDefined = name: (lib.getAttrFromPath name options.services).isDefined;
  alias =
    from:
    lib.doRename {
      from = [ "services" ] ++ from;
      to = [
        "services"
        "harmonia"
        (lib.last from)
      ];
      visible = false;
      warn = false;
      use = lib.id;
    };

  # Options without an effect here, with the defaults of the old modules, because other modules may read them.
  string = types.nullOr types.str;
  strings = types.listOf types.str;
  option = type: default: mkOption { inherit type default; };
  ineffective = {
    daemon = {
      enable = option types.bool false;
      dbPath = option types.str "/nix/var/nix/db/db.sqlite";
      logLevel = option types.str "info";
      socketPath = option types.str "/run/harmonia-daemon/socket";
      storeDir = option types.str "/nix/store";
    };
    gc = {
      enable = option types.bool false;
      argv = option strings [ ];
      automatic = option types.bool false;
      chunkSize = option (types.nullOr types.int) null;
      dates = option (types.either types.str strings) [ "03:15" ];
      deleteOlderThan = option string null;
      ensureFree = option string null;
      extraArgs = option strings [ ];
      gcRootsDirs = option strings [ ];
      keepRecent = option string null;
      noVacuum = option types.bool false;
      persistent = option types.bool true;
      randomizedDelaySec = option types.str "0";
    };
  };
  isSet = part: cfg.${part} != lib.mapAttrs (_: each: each.default) ineffective.${part};

  remedies =
    lib.optional (lib.any isDefined ofUpstream) "services.harmonia-dev: rename it to services.harmonia. The unit is harmonia.service."
    ++ lib.optional (
      cfg.signKeyPath != null
    ) "services.harmonia.signKeyPath is deprecated: add the path to signKeyPaths."
    ++ lib.optional (isSet "daemon") "services.harmonia.daemon has no effect, because this Harmonia reads the store without a daemon: remove it."
    ++ lib.optional (isSet "gc") "services.harmonia.gc has no effect, and nothing collects garbage in its place: use nix.gc.automatic, nix.gc.dates and nix.gc.options.";
in
{
  imports = map alias (
    ofNixpkgs
    ++ ofUpstream
    ++ map (part: [
      "harmonia-dev"
      part
    ]) (lib.attrNames ineffective)
  );

  options.services.harmonia = {
    signKeyPath = mkOption {
      type = types.nullOr types.path;
      default = null;
      visible = false;
    };
  }
  // lib.mapAttrs (
    _: parts:
    mkOption {
      type = types.submodule {
        freeformType = types.attrsOf types.anything;
        options = parts;
      };
      default = { };
      visible = false;
    }
  ) ineffective;

  config.warnings = lib.optional (remedies != [ ]) (lib.concatStringsSep "\n" remedies);
}

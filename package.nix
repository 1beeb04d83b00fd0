{
  lib,
  python3Packages,
  stdenv,
  installShellFiles,
  # Support for a mirror in an S3 bucket.
  withLan ? false,
  withS3 ? false,
  # For the tests: programs to compare with, and openssl for certificates.
  nix,
  openssl,
  zstd,
}:
let
  inherit (lib) fileset;

  # Sanic before 25.12.1 ends some responses that failed half-way as if they were complete.
  sanic =
    if lib.versionAtLeast python3Packages.sanic.version "25.12.1" then
      python3Packages.sanic
    else
      python3Packages.sanic.overridePythonAttrs (_: rec {
        version = "25.12.1";
        src = python3Packages.fetchPypi {
          pname = "sanic";
          inherit version;
          hash = "sha256-e1G/YI5AMPBqbAAs0I/tKHLkk2Un5jyaipfVzQaitH8=";
        };
        # The tests in nixpkgs belong to another version of Sanic.
        doCheck = false;
      });

  sources =
    files:
    fileset.toSource {
      root = ./.;
      fileset = fileset.unions files;
    };

  # Sources of the package only, so that changes of other files do not cause a rebuild.
  built = [
    ./LICENSE
    ./README.md
    ./harmonia
    ./pyproject.toml
  ];

  # Sources of the tests, with the documents that they compare with the code. Tests of the module are flake checks.
  tested = built ++ [
    ./docs/grafana-dashboard.json
    ./docs/reference/library
    ./docs/openapi.json
    ./docs/reference/metrics.md
    (fileset.difference ./tests (
      fileset.unions [
        ./tests/e2e/test_troubleshooting.py
        ./tests/test_benchmarks.py
        ./tests/test_commit_titles.py
        ./tests/test_contributing.py
        ./tests/test_dependencies.py
        ./tests/test_docs.py
        ./tests/test_generated.py
        ./tests/test_migration.py
        ./tests/test_nixos_checks.py
        ./tests/test_nixos_lab.py
        ./tests/test_nixos_migration.py
        ./tests/test_nixos_module.py
        ./tests/test_proxies.py
        ./tests/test_readme.py
      ]
    ))
  ];

  # Packages that the tests import, beyond Harmonia's dependencies.
  testDependencies = [
    python3Packages.h11
    python3Packages.hypothesis
    python3Packages.ifaddr
    python3Packages.obstore
    python3Packages.pytest
    python3Packages.pytest-timeout
    python3Packages.pytest-xdist
    python3Packages.websockets
    python3Packages.zeroconf
  ]
  # In nixpkgs since the middle of 2026.
  ++ lib.optional (python3Packages ? schemathesis) python3Packages.schemathesis;

  optional-dependencies.lan = [
    python3Packages.ifaddr
    python3Packages.zeroconf
  ];
  optional-dependencies.s3 = [ python3Packages.obstore ];

  harmonia = python3Packages.buildPythonApplication {
    pname = "harmonia";
    version = lib.head (
      builtins.match ".*__version__ = \"([^\"]+)\".*" (builtins.readFile ./harmonia/__init__.py)
    );
    pyproject = true;

    src = sources built;

    build-system = [ python3Packages.hatchling ];
    dependencies = [
      python3Packages.aiohttp
      python3Packages.brotli
      python3Packages.cachetools
      python3Packages.click
      python3Packages.html5tagger
      python3Packages.msgspec
      python3Packages.multidict
      python3Packages.prometheus-client
      python3Packages.pynacl
      python3Packages.rich
      sanic
      python3Packages.uvloop
      python3Packages.xxhash
      python3Packages.yarl
      python3Packages.zstandard
    ]
    ++ lib.optionals withLan optional-dependencies.lan
    ++ lib.optionals withS3 optional-dependencies.s3;
    inherit optional-dependencies;

    nativeBuildInputs = [ installShellFiles ];
    postInstall = lib.optionalString (stdenv.buildPlatform.canExecute stdenv.hostPlatform) ''
      $out/bin/harmonia man >harmonia.1
      installManPage harmonia.1
      installShellCompletion --cmd harmonia \
        --bash <(_HARMONIA_COMPLETE=bash_source $out/bin/harmonia) \
        --zsh <(_HARMONIA_COMPLETE=zsh_source $out/bin/harmonia) \
        --fish <(_HARMONIA_COMPLETE=fish_source $out/bin/harmonia)
    '';

    # Not in the build, because the tests take ten minutes on a small machine and no public cache has the package. Use
    # tests.pytest.
    doCheck = false;
    passthru = {
      inherit testDependencies;
      tests.pytest = harmonia.overridePythonAttrs {
        pname = "harmonia-tests";
        src = sources tested;
        doCheck = true;
        nativeCheckInputs = testDependencies ++ [
          nix
          openssl
          python3Packages.pytestCheckHook
          zstd
        ];
        # The hook of pytest-xdist adds --numprocesses with the number of cores.
        pytestFlags = [ "--dist=worksteal" ];
        preCheck = ''
          export HOME=$TMPDIR
        '';
        # These need root, chroots created with Debian's tools, or a browser.
        disabledTestMarks = [
          "browser"
          "newer_nix"
          "root"
        ];
      };
    };

    meta = {
      description = "Nix binary cache that serves your Nix store over HTTP, with verified, resumable downloads";
      license = lib.licenses.mit;
      mainProgram = "harmonia";
      platforms = lib.platforms.linux;
    };
  };
in
harmonia

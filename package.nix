{
  lib,
  python3Packages,
  stdenv,
  installShellFiles,
  # For the tests: what is compared with us, and what makes certificates.
  nix,
  openssl,
  zstd,
}:
let
  inherit (lib) fileset;

  # Sanic before 25.12.1 finishes some answers that failed half-way as if they were whole.
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
        # Its own tests are of the version that nixpkgs has.
        doCheck = false;
      });

  sources =
    files:
    fileset.toSource {
      root = ./.;
      fileset = fileset.unions files;
    };

  # What is built, and nothing else: other files may change without a new build.
  built = [
    ./LICENSE
    ./README.md
    ./harmonia
    ./pyproject.toml
  ];

  # The documents are those that tests hold to the code. The flake's own checks see to the module and its tests.
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
        ./tests/test_nixos_lab.py
        ./tests/test_nixos_migration.py
        ./tests/test_nixos_module.py
        ./tests/test_proxies.py
        ./tests/test_readme.py
      ]
    ))
  ];

  # What the tests import besides Harmonia's own dependencies.
  testDependencies = [
    python3Packages.h11
    python3Packages.hypothesis
    python3Packages.pytest
    python3Packages.pytest-timeout
    python3Packages.pytest-xdist
    python3Packages.websockets
  ]
  # It came to nixpkgs in the middle of 2026.
  ++ lib.optional (python3Packages ? schemathesis) python3Packages.schemathesis;

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
    ];

    nativeBuildInputs = [ installShellFiles ];
    postInstall = lib.optionalString (stdenv.buildPlatform.canExecute stdenv.hostPlatform) ''
      $out/bin/harmonia man >harmonia.1
      installManPage harmonia.1
      installShellCompletion --cmd harmonia \
        --bash <(_HARMONIA_COMPLETE=bash_source $out/bin/harmonia) \
        --zsh <(_HARMONIA_COMPLETE=zsh_source $out/bin/harmonia) \
        --fish <(_HARMONIA_COMPLETE=fish_source $out/bin/harmonia)
    '';

    # The tests take ten minutes on a small machine, and no public cache has this package: tests.pytest runs them.
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
        # pytest-xdist's hook adds one process for each core.
        pytestFlags = [ "--dist=worksteal" ];
        preCheck = ''
          export HOME=$TMPDIR
        '';
        # They need root, chroots made with Debian's tools, or a browser.
        disabledTestMarks = [
          "browser"
          "newer_nix"
          "root"
        ];
      };
    };

    meta = {
      description = "Nix binary cache that serves a machine's own store, and never half of it";
      license = lib.licenses.mit;
      mainProgram = "harmonia";
      platforms = lib.platforms.linux;
    };
  };
in
harmonia

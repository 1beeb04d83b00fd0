{
  description = "Harmonia, a Nix binary cache: serves your Nix store over HTTP, with verified, resumable downloads";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-26.05";

  outputs =
    { self, nixpkgs }:
    let
      inherit (nixpkgs) lib;
      eachSystem =
        f: lib.genAttrs [ "x86_64-linux" "aarch64-linux" ] (system: f nixpkgs.legacyPackages.${system});
      package = pkgs: pkgs.callPackage ./package.nix { };

      # Each .nix file in nixos-tests is a check.
      tests =
        lib.mapAttrs'
          (file: _: lib.nameValuePair (lib.removeSuffix ".nix" file) (./nixos-tests + "/${file}"))
          (
            lib.filterAttrs (file: kind: kind == "regular" && lib.hasSuffix ".nix" file) (
              builtins.readDir ./nixos-tests
            )
          );
      vmTest =
        pkgs: test:
        pkgs.testers.runNixOSTest {
          imports = [ test ];
          defaults.imports = [ self.nixosModules.default ];
        };

      # The tools of treefmt.toml. pyproject.toml requires the versions of ruff and mypy in nixpkgs.
      formatters = pkgs: [
        pkgs.nixfmt
        pkgs.ruff
        pkgs.shellcheck
        pkgs.shfmt
        pkgs.treefmt
      ];
      # Python with the dependencies of the code and its tests, for mypy.
      python =
        pkgs:
        let
          harmonia = package pkgs;
        in
        pkgs.python3.withPackages (
          packages: [ packages.mypy ] ++ harmonia.dependencies ++ harmonia.testDependencies
        );

      # The same as `make check`.
      lints =
        pkgs:
        pkgs.runCommand "harmonia-lints" { nativeBuildInputs = formatters pkgs ++ [ (python pkgs) ]; } ''
          cp -r ${self} source
          chmod -R u+w source
          cd source
          export HOME=$TMPDIR
          treefmt --ci
          python -m mypy
          touch "$out"
        '';

      # Check that a machine with nearly all options evaluates to a complete system, with its assertions.
      evaluation =
        pkgs:
        let
          machine = lib.nixosSystem {
            modules = [
              self.nixosModules.default
              {
                boot.isContainer = true;
                nixpkgs.hostPlatform = pkgs.stdenv.hostPlatform.system;
                system.stateVersion = "26.05";
                services.harmonia = {
                  enable = true;
                  cacheSize = "5G";
                  nginx.enable = true;
                  nginx.hostName = "cache.example.org";
                  openFirewall = true;
                  signKeyPaths = [ "/var/lib/secrets/cache.secret" ];
                };
                security.acme.acceptTerms = true;
                security.acme.defaults.email = "root@example.org";
              }
            ];
          };
          inherit (machine.config.system.build) toplevel;
          inherit (machine.config.systemd) units;
        in
        builtins.seq toplevel.drvPath pkgs.runCommand "harmonia-module" { } ''
          grep -q DynamicUser=true ${units."harmonia.service".unit}/harmonia.service
          grep -q ListenStream=/run/harmonia/socket ${units."harmonia.socket".unit}/harmonia.socket
          touch "$out"
        '';
    in
    {
      packages = eachSystem (pkgs: rec {
        harmonia = package pkgs;
        default = harmonia;
      });

      # Not `harmonia`, because that is the Rust Harmonia in nixpkgs, which other packages may need.
      overlays.default = final: prev: { harmonia-py = package final; };

      nixosModules = rec {
        harmonia = import ./module.nix;
        default = harmonia;
      };

      devShells = eachSystem (pkgs: {
        default = pkgs.mkShell {
          packages = formatters pkgs ++ [ (python pkgs) ];
        };
      });

      formatter = eachSystem (
        pkgs:
        pkgs.writeShellApplication {
          name = "harmonia-format";
          runtimeInputs = formatters pkgs;
          text = ''exec treefmt "$@"'';
        }
      );

      checks = eachSystem (
        pkgs:
        {
          package = package pkgs;
          pytest = (package pkgs).tests.pytest;
          lints = lints pkgs;
          module = evaluation pkgs;
        }
        // lib.mapAttrs (_: vmTest pkgs) tests
      );
    };
}

{
  description = "Harmonia, a Nix binary cache that serves a machine's own store, and never half of it";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-26.05";

  outputs =
    { self, nixpkgs }:
    let
      inherit (nixpkgs) lib;
      eachSystem =
        f: lib.genAttrs [ "x86_64-linux" "aarch64-linux" ] (system: f nixpkgs.legacyPackages.${system});
      package = pkgs: pkgs.callPackage ./package.nix { };

      # A file in nixos-tests is a check by being there.
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

      # What treefmt.toml names. pyproject.toml names the versions of ruff and mypy that nixpkgs has.
      formatters = pkgs: [
        pkgs.nixfmt
        pkgs.ruff
        pkgs.shellcheck
        pkgs.shfmt
        pkgs.treefmt
      ];
      # Python with all that the code and its tests import, for mypy.
      python =
        pkgs:
        let
          harmonia = package pkgs;
        in
        pkgs.python3.withPackages (
          packages: [ packages.mypy ] ++ harmonia.dependencies ++ harmonia.testDependencies
        );

      # As `make check`.
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

      # That a machine with nearly everything evaluates down to its whole system, whose assertions hold.
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

      # A name of its own: nixpkgs' `harmonia` is the one written in Rust, and other packages may want that.
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

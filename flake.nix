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

      # `make check` runs all lints of Python, with the versions that pyproject.toml names. nixpkgs' ruff is another one:
      # here are those that mean the same in all of them.
      lints =
        pkgs:
        pkgs.runCommand "harmonia-lints"
          {
            nativeBuildInputs = [
              pkgs.nixfmt
              pkgs.ruff
            ];
          }
          ''
            cd ${self}
            ruff check --no-cache --select E,F,I,W
            find . -name '*.nix' -exec nixfmt --check {} +
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
          inputsFrom = [ (package pkgs) ];
          packages = [
            pkgs.nixfmt
            pkgs.ruff
            pkgs.python3Packages.mypy
          ];
        };
      });

      formatter = eachSystem (pkgs: pkgs.nixfmt-tree);

      checks = eachSystem (
        pkgs:
        {
          package = package pkgs;
          lints = lints pkgs;
          module = evaluation pkgs;
        }
        // lib.mapAttrs (_: vmTest pkgs) tests
      );
    };
}

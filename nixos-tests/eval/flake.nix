# Replaces nixpkgs in `nix flake check --no-build --override-input nixpkgs path:nixos-tests/eval`.
{
  outputs =
    { self }:
    let
      lib = import ./lib.nix;
      systems = [
        "x86_64-linux"
        "aarch64-linux"
      ];
      pkgs = lib.genAttrs systems (system: import ./pkgs.nix { inherit lib system; });
      nixos = lib.mapAttrs (_: pkgs: import ./nixos.nix { inherit lib pkgs; }) pkgs;
      runNixOSTest =
        system: test:
        import ./bundle.nix {
          inherit lib;
          inherit (nixos.${system}) own;
          pkgs = pkgs.${system};
        } (nixos.${system}.evalTest test);
    in
    {
      lib = lib // {
        nixosSystem =
          {
            modules,
            system ? "x86_64-linux",
          }:
          {
            config = nixos.${system}.evalConfig "machine" modules;
          };
      };
      legacyPackages = lib.mapAttrs (
        system: pkgs: pkgs // { testers.runNixOSTest = runNixOSTest system; }
      ) pkgs;
    };
}

# Evaluation of Harmonia's module and tests without a NixOS cache. Uses our own small module system, or the modules of
# nixpkgs if $NIXPKGS names a tree. docs/reference/nixos-tests.md describes what that proves and what not.
{
  nixpkgs ? builtins.getEnv "NIXPKGS",
  system ? "x86_64-linux",
  wheels ? null,
}:
let
  world =
    if nixpkgs == "" then
      let
        lib = import ./lib.nix;
        pkgs = import ./pkgs.nix { inherit lib system wheels; };
      in
      import ./nixos.nix { inherit lib pkgs; } // { inherit lib pkgs; }
    else
      import ./real.nix { inherit nixpkgs system wheels; };
  inherit (world) lib pkgs;
  module = ../../module.nix;

  files = lib.filterAttrs (name: kind: kind == "regular" && lib.hasSuffix ".nix" name) (
    builtins.readDir ../.
  );
  tests = lib.mapAttrs' (
    file: _:
    lib.nameValuePair (lib.removeSuffix ".nix" file) (
      world.evalTest {
        imports = [ (../. + "/${file}") ];
        defaults.imports = [ module ];
      }
    )
  ) files;
  bundle = import ./bundle.nix {
    inherit lib pkgs;
    inherit (world) own;
  };

  # Documentation of an option, and of the options of its submodules.
  shown =
    name: option:
    if !(option.visible or true) then
      [ ]
    else
      [
        {
          inherit name;
          type = option.type.description;
          inherit (option) description;
          default = option.defaultText or option.default or null;
          example = option.example or null;
          required = !(option ? default);
        }
      ]
      ++ lib.optionals (option.type ? getSubOptions) (
        shownBelow name (option.type.getSubOptions [ name ])
      );
  shownBelow =
    name: tree:
    lib.concatLists (
      lib.mapAttrsToList (
        part: each:
        if lib.isOption each then shown "${name}.${part}" each else shownBelow "${name}.${part}" each
      ) tree
    );
in
{
  inherit lib pkgs;
  # Reference of the options, evaluated by our own module system only.
  options = shownBelow "services.harmonia" (world.evalOptions [ module ]).services.harmonia;
  names = builtins.attrNames tests;
  # bundle.json of each test, with its closure. (nix-build would call a value with a __functor.)
  tests = lib.mapAttrs (_: test: removeAttrs (bundle test) [ "__functor" ]) tests;
  # Configurations of the machines of each test.
  machines = lib.mapAttrs (_: test: test.nodes) tests;
  package = pkgs.callPackage ../../package.nix { };
  # NixOS configuration of a module together with ours.
  configure =
    configuration:
    world.evalConfig "machine" [
      module
      configuration
    ];
}

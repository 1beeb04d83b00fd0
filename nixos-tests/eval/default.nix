# The NixOS side of Harmonia, evaluated without a NixOS cache: by our own small module system, which needs nothing, or
# by the real modules of a nixpkgs tree that $NIXPKGS names. See docs/reference/nixos-tests.md for what that shows and what not.
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

  # What people see of an option, and of those of a submodule in it.
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
  # The reference of the options, by our own module system alone.
  options = shownBelow "services.harmonia" (world.evalOptions [ module ]).services.harmonia;
  names = builtins.attrNames tests;
  # Each test as bundle.json with all that it needs. (nix-build would call what has a __functor.)
  tests = lib.mapAttrs (_: test: removeAttrs (bundle test) [ "__functor" ]) tests;
  # The machines of each test: their configurations.
  machines = lib.mapAttrs (_: test: test.nodes) tests;
  package = pkgs.callPackage ../../package.nix { };
  # The NixOS configuration that a module gives beside ours.
  configure =
    configuration:
    world.evalConfig "machine" [
      module
      configuration
    ];
}

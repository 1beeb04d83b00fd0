# A machine that can build /etc/contents.nix. Nothing of that is there before.
{ pkgs, ... }:
{
  virtualisation.writableStore = true;
  environment.etc."contents.nix".text = ''
    import ${./contents.nix} {
      bash = builtins.storePath "${pkgs.bash}";
      coreutils = builtins.storePath "${pkgs.coreutils}";
    }
  '';
}

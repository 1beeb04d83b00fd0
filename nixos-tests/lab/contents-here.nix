# A machine that can build /etc/contents.nix. Nothing of it is built in advance.
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

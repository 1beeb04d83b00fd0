# A cache that builds the paths it serves.
{ lib, ... }:
{
  imports = [ ./contents-here.nix ];
  nix.settings.substituters = lib.mkForce [ ];

  environment.etc."cache.secret" = {
    text = (import ./keys.nix).one.secret;
    mode = "0400";
  };
  services.harmonia = {
    enable = true;
    openFirewall = true;
    signKeyPaths = [ "/etc/cache.secret" ];
    settings.access_log = true;
  };
}

# A machine that substitutes from the server, and from nowhere else, with signatures required.
{ lib, ... }:
{
  nix.settings = {
    substituters = lib.mkForce [ "http://server:5000" ];
    trusted-public-keys = lib.mkForce [ (import ./keys.nix).one.public ];
  };
}

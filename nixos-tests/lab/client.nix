# A machine that substitutes only from the server, and requires signatures.
{ lib, ... }:
{
  nix.settings = {
    substituters = lib.mkForce [ "http://server:5000" ];
    trusted-public-keys = lib.mkForce [ (import ./keys.nix).one.public ];
  };
}

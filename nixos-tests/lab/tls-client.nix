# A client of https://server. All tests with TLS use the same certificate.
{ pkgs, lib, ... }:
let
  certificate = import ./certificate.nix { inherit pkgs; };
in
{
  imports = [ ./client.nix ];
  nix.settings = {
    substituters = lib.mkOverride 40 [ "https://server" ];
    ssl-cert-file = "/etc/server.pem";
  };
  environment.etc."server.pem".source = "${certificate}/cert.pem";
}

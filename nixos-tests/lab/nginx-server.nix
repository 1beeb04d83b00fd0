# A cache behind nginx with TLS, at https://server.
{ pkgs, ... }:
let
  certificate = import ./certificate.nix { inherit pkgs; };
in
{
  imports = [ ./server.nix ];
  services.harmonia.nginx = {
    enable = true;
    hostName = "server";
  };
  services.nginx.virtualHosts.server = {
    enableACME = false;
    sslCertificate = "${certificate}/cert.pem";
    sslCertificateKey = "${certificate}/key.pem";
  };
}

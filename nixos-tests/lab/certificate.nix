# Self-signed certificate and key of the machine `server`.
{ pkgs }:
pkgs.runCommand "certificate" { nativeBuildInputs = [ pkgs.openssl ]; } ''
  mkdir "$out"
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -noenc -days 36500 -subj /CN=server \
    -addext subjectAltName=DNS:server -keyout "$out/key.pem" -out "$out/cert.pem"
''

# A private cache that serves TLS itself: clients need a token, and only root can read its key and tokens.
{ pkgs, lib, ... }:
let
  certificate = import ./lab/certificate.nix { inherit pkgs; };
in
{
  name = "harmonia-private";

  nodes.server = {
    imports = [ ./lab/server.nix ];
    environment.etc."tls.key" = {
      source = "${certificate}/key.pem";
      mode = "0400";
    };
    services.harmonia.settings = {
      bind = "[::]:443";
      tls_cert_path = "${certificate}/cert.pem";
      tls_key_path = "/etc/tls.key";
      tokens_path = "/var/lib/tokens";
    };
    # Start only after there is a token.
    systemd.services.harmonia.wantedBy = lib.mkForce [ ];
  };

  nodes.client = {
    imports = [ ./lab/tls-client.nix ];
    nix.settings.netrc-file = "/var/lib/netrc";
  };

  testScript = ''
    import re

    narinfo = "curl --silent --cacert /etc/server.pem --output /dev/null --write-out '%{http_code}' https://server"

    start_all()
    server.wait_for_unit("harmonia.socket")
    printed = server.succeed("harmonia token builder")
    token, line = re.search(r"harmonia_\S+", printed), re.search(r"builder +read +sha256:\S+", printed)
    assert token and line, printed
    server.succeed(f"install -D -m 400 /dev/null /var/lib/tokens; echo '{line[0]}' >/var/lib/tokens")
    hello, names = server.succeed("nix-build --no-out-link /etc/contents.nix -A hello -A names").split()
    narinfo += f"/{hello.removeprefix('/nix/store/')[:32]}.narinfo"

    with subtest("without a token, the client gets 401"):
        client.wait_until_succeeds(f"test $({narinfo}) = 401")
        client.fail(f"nix-store --realise {hello} >&2")

    with subtest("with a token, the client substitutes"):
        client.succeed(
            "install -D -m 600 /dev/null /var/lib/netrc",
            f"echo 'machine server login builder password {token[0]}' >/var/lib/netrc",
            f"nix-store --realise {hello} >&2",
            f"{hello}/bin/hello >&2",
        )

    with subtest("other users of the server cannot read the credentials"):
        user = "setpriv --reuid=65534 --regid=65534 --clear-groups"
        for file in "tls_key_path", "tokens_path", "sign-key-0":
            server.succeed(f"test -s /run/credentials/harmonia.service/{file}")
            server.fail(f"{user} cat /run/credentials/harmonia.service/{file} >&2")

    with subtest("a revoked token gets 401 after a restart"):
        server.succeed("echo >/var/lib/tokens", "systemctl restart harmonia.service")
        client.succeed(f"test $({narinfo} --netrc-file /var/lib/netrc) = 401")
        client.fail(f"nix-store --realise {names} >&2")
  '';
}

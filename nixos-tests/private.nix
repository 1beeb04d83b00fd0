# A private cache that serves TLS itself: who has no token gets nothing, and what it is made of is for root alone to read.
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
    # Not before there is a token.
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
    told = server.succeed("harmonia token builder")
    token, line = re.search(r"harmonia_\S+", told), re.search(r"builder +read +sha256:\S+", told)
    assert token and line, told
    server.succeed(f"install -D -m 400 /dev/null /var/lib/tokens; echo '{line[0]}' >/var/lib/tokens")
    hello, names = server.succeed("nix-build --no-out-link /etc/contents.nix -A hello -A names").split()
    narinfo += f"/{hello.removeprefix('/nix/store/')[:32]}.narinfo"

    with subtest("without a token, there is nothing"):
        client.wait_until_succeeds(f"test $({narinfo}) = 401")
        client.fail(f"nix-store --realise {hello} >&2")

    with subtest("with one, all of it"):
        client.succeed(
            "install -D -m 600 /dev/null /var/lib/netrc",
            f"echo 'machine server login builder password {token[0]}' >/var/lib/netrc",
            f"nix-store --realise {hello} >&2",
            f"{hello}/bin/hello >&2",
        )

    with subtest("other users of the server cannot read what was handed over"):
        user = "setpriv --reuid=65534 --regid=65534 --clear-groups"
        for file in "tls_key_path", "tokens_path", "sign-key-0":
            server.succeed(f"test -s /run/credentials/harmonia.service/{file}")
            server.fail(f"{user} cat /run/credentials/harmonia.service/{file} >&2")

    with subtest("a token that is taken back lets nobody in after a restart"):
        server.succeed("echo >/var/lib/tokens", "systemctl restart harmonia.service")
        client.succeed(f"test $({narinfo} --netrc-file /var/lib/netrc) = 401")
        client.fail(f"nix-store --realise {names} >&2")
  '';
}

# What a cache does not have, it gets from another one behind it: once, for whoever asks.
let
  key = (import ./lab/keys.nix).one;
in
{
  name = "harmonia-upstream";
  nodes.origin.imports = [ ./lab/server.nix ];

  nodes.server = {
    services.harmonia = {
      enable = true;
      openFirewall = true;
      settings.access_log = true;
      settings.workers = 2;
      settings.upstream = [
        {
          url = "http://origin:5000";
          public_keys = [ key.public ];
        }
      ];
    };
  };

  nodes.client.imports = [ ./lab/client.nix ];

  testScript = ''
    start_all()
    origin.wait_for_unit("harmonia.service")
    origin.wait_for_open_port(5000)
    server.wait_for_unit("harmonia.service")
    # Its workers may have come up first, and then look again in their own time.
    server.wait_until_succeeds("curl --fail --silent http://localhost:5000/metrics | grep '^harmonia_upstream_up.* 2.0$' >&2")
    client.wait_until_succeeds("curl --fail --silent --show-error http://server:5000/nix-cache-info >&2")
    hello, greeting = origin.succeed("nix-build --no-out-link /etc/contents.nix -A hello -A greeting").split()
    url = f"http://server:5000/{greeting[11:43]}.narinfo"

    # Once the origin has compressed the NAR, it gives it another name, which a worker may hear of that has not asked before.
    nar = client.succeed(f"curl --fail --silent {url} | grep '^URL: '").split()[1]

    with subtest("the client gets from the server what only the origin has"):
        client.fail(f"test -e {hello}")
        server.fail(f"test -e {hello}")
        client.succeed(f"nix-store --realise {hello} >&2")
        client.succeed(f"nix-store --verify-path {hello} {greeting}")
        assert client.succeed(f"{hello}/bin/hello") == origin.succeed(f"cat {greeting}")
        server.fail(f"test -e {hello}")

    with subtest("it asked the server alone, and the server the origin"):
        addresses = {line.split()[0] for line in origin.succeed("getent ahosts server").splitlines()}
        asked = origin.wait_until_succeeds(
            f"journalctl --unit=harmonia.service --output=cat | grep --fixed-strings 'GET /nar/{greeting[11:43]}-'",
            timeout=60,
        )
        assert any(f" {address} " in asked for address in addresses), asked
        assert len(asked.splitlines()) == 1, asked

    with subtest("the next client needs the origin no more"):
        origin.succeed("systemctl stop harmonia.socket harmonia.service")
        client.fail("curl --fail --silent http://origin:5000/nix-cache-info")
        client.succeed(f"curl --fail --silent --show-error --output /tmp/nar http://server:5000/{nar}")
        client.succeed("test -s /tmp/nar")
  '';
}

# A cache fetches missing paths from an upstream cache, once for all clients.
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
    # If a worker started before the origin, it tries again later.
    server.wait_until_succeeds("curl --fail --silent http://localhost:5000/metrics | grep '^harmonia_upstream_up.* 2.0$' >&2")
    client.wait_until_succeeds("curl --fail --silent --show-error http://server:5000/nix-cache-info >&2")
    hello, greeting = origin.succeed("nix-build --no-out-link /etc/contents.nix -A hello -A greeting").split()
    url = f"http://server:5000/{greeting[11:43]}.narinfo"

    # After the origin has compressed the NAR, its narinfo has another URL, and another worker would see that one.
    nar = client.succeed(f"curl --fail --silent {url} | grep '^URL: '").split()[1]

    with subtest("the client gets a path from the server that only the origin has"):
        client.fail(f"test -e {hello}")
        server.fail(f"test -e {hello}")
        client.succeed(f"nix-store --realise {hello} >&2")
        client.succeed(f"nix-store --verify-path {hello} {greeting}")
        assert client.succeed(f"{hello}/bin/hello") == origin.succeed(f"cat {greeting}")
        server.fail(f"test -e {hello}")

    with subtest("the client asked only the server, and the server asked the origin"):
        addresses = {line.split()[0] for line in origin.succeed("getent ahosts server").splitlines()}
        asked = origin.wait_until_succeeds(
            f"journalctl --unit=harmonia.service --output=cat | grep --fixed-strings 'GET /nar/{greeting[11:43]}-'",
            timeout=60,
        )
        assert any(f" {address} " in asked for address in addresses), asked
        assert len(asked.splitlines()) == 1, asked

    with subtest("the next client gets the NAR without the origin"):
        origin.succeed("systemctl stop harmonia.socket harmonia.service")
        client.fail("curl --fail --silent http://origin:5000/nix-cache-info")
        client.succeed(f"curl --fail --silent --show-error --output /tmp/nar http://server:5000/{nar}")
        client.succeed("test -s /tmp/nar")
  '';
}

# The machine gets the address in `bind` only after the boot, like that of a VPN. The socket listens before.
{
  name = "harmonia-late-address";
  nodes.server =
    { pkgs, ... }:
    {
      imports = [ ./lab/server.nix ];
      services.harmonia.settings.bind = "100.64.0.7:5000";
      environment.systemPackages = [
        pkgs.curl
        pkgs.iproute2
      ];
    };
  nodes.client =
    { pkgs, ... }:
    {
      imports = [ ./lab/client.nix ];
      environment.systemPackages = [
        pkgs.curl
        pkgs.iproute2
      ];
    };

  testScript = ''
    url = "http://100.64.0.7:5000/nix-cache-info"
    start_all()
    server.wait_for_unit("harmonia.service")

    with subtest("the server runs without the address"):
        server.fail("ip address show | grep 100.64.0.7 >&2")
        server.require_unit_state("harmonia.socket", "active")
        server.fail(f"curl --fail --silent {url} >&2")

    with subtest("the server answers as soon as the address is there"):
        server.succeed("ip address add 100.64.0.7/32 dev lo")
        client.succeed(f"ip route add 100.64.0.7 via $(getent ahostsv4 server | head -n 1 | cut -d ' ' -f 1)")
        client.succeed(f"curl --fail --silent --show-error {url} >&2")

    with subtest("the server answers after a reboot of its units without the address"):
        server.succeed("ip address del 100.64.0.7/32 dev lo")
        server.succeed("systemctl stop harmonia.service harmonia.socket")
        server.succeed("systemctl start harmonia.socket harmonia.service")
        server.succeed("ip address add 100.64.0.7/32 dev lo")
        client.succeed(f"curl --fail --silent --show-error {url} >&2")
  '';
}

# A service that runs as root without capabilities serves a database that only root can read.
{
  name = "harmonia-closed-database";
  nodes.server =
    { lib, ... }:
    {
      imports = [ ./lab/server.nix ];
      systemd.services.harmonia = {
        # Start only after the database is readable to root alone.
        wantedBy = lib.mkForce [ ];
        serviceConfig = {
          DynamicUser = lib.mkForce false;
          User = lib.mkForce "root";
          Group = lib.mkForce "root";
        };
      };
    };
  nodes.client.imports = [ ./lab/client.nix ];

  testScript = ''
    start_all()
    server.wait_for_unit("harmonia.socket")
    hello = server.succeed("nix-build --no-out-link /etc/contents.nix -A hello").strip()
    server.succeed("chmod 700 /nix/var/nix/db; chmod 600 /nix/var/nix/db/db.sqlite")

    with subtest("the path is served"):
        client.wait_until_succeeds("curl --fail --silent --show-error http://server:5000/nix-cache-info >&2")
        client.succeed(f"nix-store --realise {hello} >&2")
        client.succeed(f"{hello}/bin/hello >&2")

    with subtest("the main process has no capabilities"):
        status = server.succeed("cat /proc/$(systemctl show --value --property=MainPID harmonia.service)/status")
        assert "CapBnd:\t0000000000000000" in status, status
  '';
}

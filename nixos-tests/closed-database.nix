# A database that only root can read is served by a service that is root, without any of root's power over files.
{
  name = "harmonia-closed-database";
  nodes.server =
    { lib, ... }:
    {
      imports = [ ./lab/server.nix ];
      systemd.services.harmonia = {
        # Not before it is closed.
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

    with subtest("it is served"):
        client.wait_until_succeeds("curl --fail --silent --show-error http://server:5000/nix-cache-info >&2")
        client.succeed(f"nix-store --realise {hello} >&2")
        client.succeed(f"{hello}/bin/hello >&2")

    with subtest("by a process without capabilities"):
        status = server.succeed("cat /proc/$(systemctl show --value --property=MainPID harmonia.service)/status")
        assert "CapBnd:\t0000000000000000" in status, status
  '';
}

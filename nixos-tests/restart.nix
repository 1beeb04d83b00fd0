# A restart interrupts no download and refuses no connection. A service that hangs is restarted. If the service cannot
# start, clients are refused at once.
{
  name = "harmonia-restart";
  nodes.server =
    { lib, ... }:
    {
      imports = [ ./lab/server.nix ];
      services.harmonia.settings.enable_compression = false;
      systemd.services.harmonia = {
        serviceConfig.WatchdogSec = lib.mkForce 4;
        unitConfig.StartLimitBurst = lib.mkForce 4;
      };
    };
  nodes.client.imports = [ ./lab/client.nix ];

  testScript = ''
    ask = "curl --fail --silent --show-error http://server:5000/nix-cache-info >&2"


    def main_pid() -> int:
        return int(server.succeed("systemctl show --value --property=MainPID harmonia.service"))


    start_all()
    server.wait_for_unit("harmonia.service")
    client.wait_until_succeeds(ask)
    noise = server.succeed("nix-build --no-out-link /etc/contents.nix -A noise").strip()
    nar_hash = server.succeed(f"nix-store --dump {noise} | sha256sum")

    with subtest("during a restart, a running download completes and new clients wait"):
        old = main_pid()
        url = f"http://server:5000/nar/{noise.removeprefix('/nix/store/')[:32]}.nar"
        # The client reads the end only when the test says so, so most of the NAR waits at the server.
        client.succeed(
            f"((curl --fail --silent {url}; echo $? >/tmp/status)"
            " | (head --bytes=1000000; until test -e /tmp/go; do sleep 0.1; done; cat)"
            " >/tmp/nar) >/dev/null 2>&1 &"
        )
        client.wait_until_succeeds("test -s /tmp/nar", timeout=60)
        server.succeed("systemctl restart --no-block harmonia.service")
        server.wait_until_succeeds("systemctl show --property=ActiveState harmonia.service | grep deactivating", timeout=60)
        client.fail("test -e /tmp/status")
        client.succeed(f"(sleep 2; touch /tmp/go) >/dev/null 2>&1 & {ask}")
        server.wait_for_unit("harmonia.service")
        assert main_pid() != old
        client.wait_until_succeeds("test $(cat /tmp/status) = 0", timeout=60)
        client.wait_until_succeeds(f"test \"$(sha256sum </tmp/nar)\" = '{nar_hash.strip()}'", timeout=60)

    with subtest("a service that hangs is restarted"):
        hanging = main_pid()
        server.succeed(f"kill -STOP {hanging}")
        client.succeed(ask)
        server.wait_until_succeeds(f"! kill -0 {hanging}", timeout=60)
        server.wait_for_unit("harmonia.service")
        client.succeed(ask)

    with subtest("no worker ended unexpectedly"):
        server.fail("journalctl --unit=harmonia.service | grep --fixed-strings 'ended with status'")

    with subtest("if the service cannot start, it and its socket fail"):
        server.succeed("chmod 0 /nix/var/nix/db", "systemctl restart --no-block harmonia.service")
        for unit in "harmonia.service", "harmonia.socket":
            server.wait_until_succeeds(f"systemctl is-failed {unit} >&2", timeout=120)
        status, _ = client.execute(ask)
        assert status == 7, status  # connection refused

    with subtest("after reset-failed, the service starts again"):
        server.succeed(
            "chmod 755 /nix/var/nix/db",
            "systemctl reset-failed harmonia.service",
            "systemctl start harmonia.socket harmonia.service",
        )
        client.succeed(ask)
  '';
}

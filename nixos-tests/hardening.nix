# The service works inside its sandbox. A probe in the same sandbox cannot do anything else.
{
  name = "harmonia-hardening";

  nodes.server =
    {
      config,
      lib,
      pkgs,
      ...
    }:
    {
      imports = [ ./lab/server.nix ];
      # The tightest sandbox: without temporary roots.
      services.harmonia.settings.daemon_socket = "";
      systemd.services.probe.serviceConfig =
        removeAttrs config.systemd.services.harmonia.serviceConfig [
          "ExecStart"
          "Restart"
          "Type"
          "WatchdogSec"
        ]
        // {
          ExecStart = "${pkgs.python3}/bin/python3 ${./lab/probe.py} client";
          Type = "oneshot";
        };
      environment.etc."probe.py".source = ./lab/probe.py;
      environment.systemPackages = [ pkgs.python3 ];
    };

  # A machine for the probe to connect to.
  nodes.client =
    { pkgs, ... }:
    {
      imports = [ ./lab/client.nix ];
      networking.firewall.allowedTCPPorts = [ 22222 ];
      systemd.services.listener = {
        wantedBy = [ "multi-user.target" ];
        serviceConfig.ExecStart = "${pkgs.python3}/bin/python3 -m http.server 22222";
      };
    };

  testScript = ''
    import re

    start_all()
    server.wait_for_unit("harmonia.service")
    server.wait_for_open_port(5000)
    client.wait_for_open_port(22222)
    server.succeed("touch /root/probe")

    with subtest("the service works"):
        hello = server.succeed("nix-build --no-out-link /etc/contents.nix -A hello").strip()
        client.succeed(f"nix-store --realise {hello} >&2")
        client.succeed(f"{hello}/bin/hello >&2")

    with subtest("outside of the sandbox, root can do everything that the probe tries"):
        outside = server.succeed("python3 /etc/probe.py client")
        # NixOS mounts the store read-only, even for root.
        assert set(re.findall("^not: ([^:]+)", outside, re.MULTILINE)) <= {"write the store"}, outside

    with subtest("inside the sandbox, every attempt fails"):
        server.succeed("systemctl start probe.service")
        # The last lines may reach the journal late.
        inside = server.wait_until_succeeds(
            "journalctl --unit=probe.service --output=cat | grep -E '^(could|not): ' >/tmp/inside"
            f" && test $(wc --lines </tmp/inside) = {len(outside.splitlines())} && cat /tmp/inside",
            timeout=60,
        )
        assert "could: " not in inside, inside

    with subtest("the service has a dynamic user and no capabilities"):
        status = server.succeed("cat /proc/$(systemctl show --value --property=MainPID harmonia.service)/status")
        assert re.search(r"^Uid:\s+(6[1-5]\d{3})\s", status, re.MULTILINE), status
        assert re.search(r"^CapBnd:\s+0+$", status, re.MULTILINE), status
        assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE), status

    with subtest("systemd-analyze reports an exposure of at most 1.0"):
        verdict = server.execute("systemd-analyze security --no-pager harmonia.service")[1]
        exposure = re.search(r"Overall exposure level for harmonia.service: ([0-9.]+)", verdict)
        print(verdict.splitlines()[-1])
        assert exposure and float(exposure[1]) <= 1.0, verdict
  '';
}

# On a network that cuts every connection after 12 MiB, a NAR of 40 MiB arrives, and hardly a byte is sent twice.
{
  name = "harmonia-resume";
  nodes.server.imports = [ ./lab/server.nix ];

  nodes.network =
    { pkgs, ... }:
    {
      networking.firewall.allowedTCPPorts = [ 5000 ];
      systemd.services.cutting-proxy = {
        wantedBy = [ "multi-user.target" ];
        serviceConfig.ExecStart = "${pkgs.python3}/bin/python3 ${./lab/cutting_proxy.py} 5000 server:5000 12582912";
      };
    };

  nodes.client =
    { lib, ... }:
    {
      imports = [ ./lab/client.nix ];
      nix.settings.substituters = lib.mkOverride 40 [ "http://network:5000" ];
    };

  testScript = ''
    import re

    start_all()
    server.wait_for_unit("harmonia.service")
    server.wait_for_open_port(5000)
    network.wait_for_open_port(5000)
    client.wait_until_succeeds("curl --fail --silent --show-error http://network:5000/nix-cache-info >&2")
    noise = server.succeed("nix-build --no-out-link /etc/contents.nix -A noise").strip()
    nar_size = int(server.succeed(f"nix-store --query --size {noise}"))

    with subtest("the download completes"):
        client.fail(f"test -e {noise}")
        client.succeed(f"nix-store --realise {noise} >&2")
        client.succeed(f"nix-store --verify-path {noise}")

    with subtest("the download was cut three times, and resumed each time"):
        network.wait_until_succeeds(
            "journalctl --unit=cutting-proxy.service --output=cat >/tmp/proxied"
            " && test $(grep --count '^open' /tmp/proxied) = $(grep --count --extended-regexp '^(cut|end)' /tmp/proxied)"
            f" && awk '/^(cut|end)/ {{ sum += $2 }} END {{ exit sum < {nar_size} }}' /tmp/proxied",
            timeout=60,
        )
        proxied = network.succeed("cat /tmp/proxied")
        assert len(re.findall("^cut ", proxied, re.MULTILINE)) == 3, proxied
        through = sum(int(size) for size in re.findall(r"^(?:cut|end) (\d+)$", proxied, re.MULTILINE))
        assert nar_size <= through < nar_size + 1_000_000, (nar_size, through)
        server.wait_until_succeeds(
            "journalctl --unit=harmonia.service --output=cat | grep 'GET /nar/' >/tmp/requests"
            " && test $(wc --lines </tmp/requests) -ge 4",
            timeout=60,
        )
        requests = server.succeed("cat /tmp/requests")
        statuses = re.findall(r"\.nar\.zst' (\d+) ", requests)
        assert sorted(statuses) == ["200", "206", "206", "206"], requests
  '';
}

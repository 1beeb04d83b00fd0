# A Harmonia between the client's Nix and a cache: started by the first substitution, killed, and ended when idle.
{ lib, ... }:
let
  key = (import ./lab/keys.nix).one;
in
{
  name = "harmonia-accelerate";

  nodes.server = {
    imports = [ ./lab/server.nix ];
    services.harmonia.settings.access_log = true;
  };

  nodes.client = {
    services.harmonia.client = {
      caches."http://server:5000" = [ key.public ];
      accelerate = {
        enable = true;
        idleExit = 10;
      };
    };
    systemd.services.harmonia-accelerate.serviceConfig.WatchdogSec = 5;
    # Without cache.nixos.org, which is not there.
    nix.settings.substituters = lib.mkForce [
      "http://127.0.0.1:5017"
      "http://server:5000"
    ];
  };

  testScript = ''
    start_all()
    server.wait_for_unit("harmonia.service")
    server.wait_for_open_port(5000)
    client.wait_for_unit("harmonia-accelerate.socket")
    client.wait_until_succeeds("curl --fail --silent --show-error http://server:5000/nix-cache-info >&2")
    hello, names, greeting = server.succeed(
        "nix-build --no-out-link /etc/contents.nix -A hello -A names -A greeting"
    ).split()

    log = "journalctl --unit=harmonia.service --output=cat"


    def asked(what):
        return server.succeed(f"{log} | grep 'GET {what}' || true").splitlines()


    def wait_until_asked(*what):
        """Wait for one of the requests: lines reach the journal late, and those of two workers in any order."""
        patterns = "".join(f" --regexp='GET {each}'" for each in what)
        server.wait_until_succeeds(f"{log} | grep{patterns} >&2", timeout=60)

    with subtest("the service does not run yet"):
        client.require_unit_state("harmonia-accelerate.service", "inactive")

    with subtest("the first substitution starts it, and takes one narinfo and one closure from the cache"):
        client.succeed(f"nix-store --realise {hello} >&2")
        client.wait_for_unit("harmonia-accelerate.service")
        client.succeed(f"nix-store --verify-path {hello} {greeting}")
        wait_until_asked(f"/{hello[11:43]}.closure")
        wait_until_asked(f"/{hello[11:43]}.narinfo")
        assert len(asked(f"/{hello[11:43]}.narinfo")) == 1, asked("/")
        assert asked(f"/{greeting[11:43]}.narinfo") == [], asked("/")

    with subtest("it has a user and a cache directory of its own"):
        user = client.succeed("systemctl show --property=DynamicUser --value harmonia-accelerate.service").strip()
        assert user == "yes", user
        client.succeed("test -d /var/cache/private/harmonia-accelerate/nar")

    with subtest("if it is killed, the next substitution starts it again"):
        client.succeed("systemctl kill --signal=KILL harmonia-accelerate.service")
        client.succeed(f"nix-store --realise {names} >&2")
        client.succeed(f"nix-store --verify-path {names}")
        wait_until_asked(f"/{names[11:43]}.closure", f"/{names[11:43]}.narinfo")

    with subtest("its socket survives a series of kills"):
        for _ in range(8):
            client.succeed("curl --fail --silent --show-error http://127.0.0.1:5017/nix-cache-info >&2")
            client.succeed("systemctl kill --signal=KILL harmonia-accelerate.service")
        client.succeed("curl --fail --silent --show-error --retry 5 http://127.0.0.1:5017/nix-cache-info >&2")

    with subtest("if it hangs, its watchdog ends it, and Nix waits so long"):
        # The daemon may keep the temporary roots of the substitution for a moment longer.
        client.wait_until_succeeds(f"nix-store --delete {names} >&2", timeout=60)
        client.succeed("curl --fail --silent --show-error http://127.0.0.1:5017/nix-cache-info >&2")
        client.wait_for_unit("harmonia-accelerate.service")
        running = "systemctl show --property=MainPID --value harmonia-accelerate.service"
        hanging = client.succeed(running)
        client.succeed("systemctl kill --signal=STOP harmonia-accelerate.service")
        client.succeed(f"nix-store --realise {names} >&2")
        client.succeed(f"nix-store --verify-path {names}")
        assert client.succeed(running) != hanging

    with subtest("it ends when it is idle, without a failure, and its socket stays"):
        client.wait_until_succeeds("test $(systemctl is-active harmonia-accelerate.service) = inactive", timeout=120)
        client.require_unit_state("harmonia-accelerate.socket", "active")
        client.succeed("curl --fail --silent --show-error http://127.0.0.1:5017/nix-cache-info >&2")
        client.wait_for_unit("harmonia-accelerate.service")
  '';
}

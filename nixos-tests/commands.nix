# Commands on the server find its settings, keys, address and cache without options.
{
  name = "harmonia-commands";
  nodes.server = {
    imports = [ ./lab/server.nix ];
    services.harmonia.settings.bind = "[::]:5007";
  };
  nodes.client.imports = [ ./lab/client.nix ];

  testScript = ''
    start_all()
    server.wait_for_unit("harmonia.service")
    server.wait_for_open_port(5007)
    noise = server.succeed("nix-build --no-out-link /etc/contents.nix -A noise").strip()
    hash_part = noise.removeprefix("/nix/store/")[:32]

    with subtest("check-config shows the settings of the service, without secrets"):
        settings = server.succeed("harmonia check-config")
        for line in "bind = \"[::]:5007\"", "priority = 50", "cache_dir = \"/var/cache/harmonia\"":
            assert line in settings, settings
        secret = server.succeed("cut -d : -f 2 /etc/cache.secret").strip()
        server.fail(f"grep --fixed-strings '{secret}' /etc/harmonia/harmonia.toml")

    with subtest("doctor tests the server, and knows its key"):
        server.succeed("harmonia doctor >&2")

    with subtest("verify hashes a path"):
        server.succeed(f"harmonia verify {noise} >&2")

    with subtest("warm fills the cache that the service reads"):
        server.succeed(f"harmonia warm {noise} >&2")
        for _ in range(2):
            assert server.succeed(f"curl --fail --silent http://localhost:5007/{hash_part}.narinfo | grep FileSize")
            server.succeed("systemctl restart harmonia.service")
        owners = server.succeed("stat --format=%u $(find /var/cache/harmonia/nar -type f)").split()
        assert owners and "0" not in owners, owners

    with subtest("the commands work for a user who is not root"):
        server.succeed("runuser -u nobody -- harmonia check-config --text-only >&2")
        server.succeed(f"runuser -u nobody -- harmonia ls {noise} >&2")
        server.succeed("runuser -u nobody -- harmonia top --once >&2")
  '';
}

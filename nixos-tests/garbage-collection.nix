# The garbage collector keeps a path while the sandboxed service sends it, and deletes it afterwards. The Nix daemon
# accepts the service's temporary root although it allows only some users.
{
  name = "harmonia-garbage-collection";
  nodes.server = {
    imports = [ ./lab/server.nix ];
    services.harmonia.settings.enable_compression = false;
    nix.settings.allowed-users = [ "@wheel" ];
  };
  nodes.client.imports = [ ./lab/client.nix ];

  testScript = ''
    start_all()
    server.wait_for_unit("harmonia.service")
    server.wait_for_open_port(5000)
    noise = server.succeed("nix-build --no-out-link /etc/contents.nix -A noise").strip()
    hash_part = noise.removeprefix("/nix/store/")[:32]
    nar_size = int(server.succeed(f"nix-store --query --size {noise}"))

    with subtest("a path is not collected while it is sent"):
        # The client reads the end only when the test says so, so most of the NAR waits at the server.
        client.succeed(
            f"(curl --fail --silent http://server:5000/nar/{hash_part}.nar"
            " | (head --bytes=1000000; until test -e /tmp/go; do sleep 0.1; done; cat)"
            " >/tmp/nar) >/dev/null 2>&1 &"
        )
        client.wait_until_succeeds("test -s /tmp/nar", timeout=60)
        server.wait_until_succeeds(f"grep --text --quiet {noise} /nix/var/nix/temproots/*", timeout=60)
        server.succeed("nix-store --gc >&2")
        server.succeed(f"nix-store --check-validity {noise}")
        client.succeed("touch /tmp/go")
        client.wait_until_succeeds(f"test $(stat --format=%s /tmp/nar) = {nar_size}", timeout=60)

    with subtest("after the download, the path is collected"):
        server.wait_until_succeeds(f"nix-store --delete {noise} >&2", timeout=60)
        server.fail(f"test -e {noise}")
  '';
}

# A store in another directory (`nix copy --to /guest`) is served as /nix/store. The server's own store is not.
{
  name = "harmonia-chroot-store";
  nodes.server =
    { lib, ... }:
    {
      imports = [ ./lab/server.nix ];
      services.harmonia.settings.real_nix_store = "/guest/nix/store";
      # Start only after the store exists.
      systemd.services.harmonia.wantedBy = lib.mkForce [ ];
    };
  nodes.client.imports = [ ./lab/client.nix ];

  testScript = ''
    start_all()
    server.wait_for_unit("harmonia.socket")
    hello, names = server.succeed("nix-build --no-out-link /etc/contents.nix -A hello -A names").split()

    with subtest("a path moves to the other store"):
        server.succeed(
            f"nix --extra-experimental-features nix-command copy --no-check-sigs --to /guest {hello} >&2",
            f"test -e /guest{hello}",
        )
        # The daemon may keep the temporary roots of `nix copy` for a moment longer.
        server.wait_until_succeeds(f"nix-store --delete {hello} >&2", timeout=60)
        server.succeed(f"test ! -e {hello}")

    with subtest("the path is served from the other store"):
        client.wait_until_succeeds("curl --fail --silent --show-error http://server:5000/nix-cache-info >&2")
        client.succeed("curl --fail --silent http://server:5000/nix-cache-info | grep 'StoreDir: /nix/store$' >&2")
        client.succeed(f"nix-store --realise {hello} >&2")
        client.succeed(f"nix-store --verify-path {hello}")
        client.succeed(f"{hello}/bin/hello >&2")

    with subtest("a path that only the server's own store has is not served"):
        server.succeed(f"test -e {names}")
        client.fail(f"nix-store --realise {names} >&2")
  '';
}

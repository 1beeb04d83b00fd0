# Paths are signed with two keys. A client that trusts either key accepts them; one that trusts neither rejects them.
let
  keys = import ./lab/keys.nix;
in
{
  name = "harmonia-signing";
  nodes.server = {
    imports = [ ./lab/server.nix ];
    environment.etc."second.secret" = {
      text = keys.two.secret;
      mode = "0400";
    };
    services.harmonia.signKeyPaths = [ "/etc/second.secret" ];
  };
  nodes.client.imports = [ ./lab/client.nix ];

  testScript = ''
    first = "${keys.one.public}"
    second = "${keys.two.public}"
    # A wrong key: the name of the second key with the bytes of the first.
    wrong = second.partition(":")[0] + ":" + first.partition(":")[2]

    start_all()
    server.wait_for_unit("harmonia.service")
    server.wait_for_open_port(5000)
    client.wait_until_succeeds("curl --fail --silent --show-error http://server:5000/nix-cache-info >&2")
    hello, names = server.succeed("nix-build --no-out-link /etc/contents.nix -A hello -A names").split()

    with subtest("each path has a signature by each key"):
        for path in hello, names:
            narinfo = client.succeed(
                f"curl --fail --silent http://server:5000/{path.removeprefix('/nix/store/')[:32]}.narinfo"
            )
            signers = {line.split(":")[1].strip() for line in narinfo.splitlines() if line.startswith("Sig: ")}
            assert signers == {key.partition(":")[0] for key in (first, second)}, narinfo

    with subtest("a client without the right key refuses the path"):
        client.fail(f"nix-store --realise {hello} --option trusted-public-keys {wrong} >&2")
        client.fail(f'nix-store --realise {hello} --option trusted-public-keys "" >&2')
        client.fail(f"test -e {hello}")

    with subtest("a client with either key accepts the path"):
        client.succeed(f"nix-store --realise {hello} --option trusted-public-keys {first} >&2")
        client.succeed(f"nix-store --realise {names} --option trusted-public-keys {second} >&2")
        client.succeed(f"nix-store --verify-path {hello} {names}")

    with subtest("only root can read the keys"):
        server.succeed("test $(stat --format=%a /etc/cache.secret) = 400")
        server.fail("journalctl --unit=harmonia.service | grep --fixed-strings ${keys.one.secret}")
  '';
}

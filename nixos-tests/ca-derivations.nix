# The client downloads the output of a content-addressed derivation that the server has built, instead of building it.
let
  features.nix.settings.experimental-features = [
    "nix-command"
    "ca-derivations"
  ];
in
{
  name = "harmonia-ca-derivations";
  nodes.server.imports = [
    ./lab/server.nix
    features
  ];
  nodes.client =
    { lib, ... }:
    {
      # The same derivation, but the client may not build.
      imports = [
        ./lab/contents-here.nix
        ./lab/client.nix
        features
      ];
      nix.settings.max-jobs = lib.mkForce 0;
    };

  testScript = ''
    start_all()
    server.wait_for_unit("harmonia.service")
    server.wait_for_open_port(5000)
    client.wait_until_succeeds("curl --fail --silent --show-error http://server:5000/nix-cache-info >&2")

    with subtest("the client cannot build the derivation"):
        client.fail("nix-build --no-out-link /etc/contents.nix -A floating >&2")

    with subtest("after the server has built the derivation, the client downloads its output"):
        built = server.succeed("nix-build --no-out-link /etc/contents.nix -A floating").strip()
        client.fail(f"test -e {built}")
        found = client.succeed(
            "nix-build --no-out-link /etc/contents.nix -A floating --option narinfo-cache-negative-ttl 0"
        )
        assert found.strip() == built
        assert client.succeed(f"cat {built}") == server.succeed(f"cat {built}")
        client.succeed(f"nix-store --verify-path {built}")

    with subtest("the client asked for the build trace and the NAR"):
        for resource in (r"/(realisations|build-trace-v2)/\S*\.doi' 200", rf"/nar/{built[11:43]}-\S*' 200"):
            server.wait_until_succeeds(
                f'journalctl --unit=harmonia.service | grep --extended-regexp "GET {resource}"', timeout=60
            )
  '';
}

# A builder pushes through nginx with TLS into the store of the server, whose Nix daemon checks the signatures. A third
# machine substitutes what was pushed, and the server keeps it until its root is dropped.
{ lib, ... }:
let
  keys = import ./lab/keys.nix;
in
{
  name = "harmonia-push";

  nodes.server = {
    imports = [ ./lab/nginx-server.nix ];
    services.harmonia.push = {
      enable = true;
      publicKeys = [ keys.two.public ];
    };
    services.harmonia.settings = {
      tokens_path = "/var/lib/tokens";
      anonymous_scopes = [ "read" ];
    };
    # Start only after there is a token.
    systemd.services.harmonia.wantedBy = lib.mkForce [ ];
  };

  nodes.builder = {
    imports = [
      ./lab/contents-here.nix
      ./lab/tls-client.nix
    ];
    nix.settings.netrc-file = "/var/lib/netrc";
    nix.settings.substituters = lib.mkForce [ ];
    environment.etc."builder.secret" = {
      text = keys.two.secret;
      mode = "0400";
    };
  };

  nodes.client = {
    imports = [ ./lab/tls-client.nix ];
    nix.settings.trusted-public-keys = lib.mkForce [ keys.two.public ];
  };

  testScript = ''
    import re

    start_all()
    server.wait_for_unit("harmonia.socket")
    server.wait_for_unit("nginx.service")
    printed = server.succeed("harmonia token builder --scope push")
    token, line = re.search(r"harmonia_\S+", printed), re.search(r"builder +push +sha256:\S+", printed)
    assert token and line, printed
    server.succeed(f"install -D -m 400 /dev/null /var/lib/tokens; echo '{line[0]}' >/var/lib/tokens")
    builder.succeed(
        "install -D -m 600 /dev/null /var/lib/netrc",
        f"echo 'machine server login builder password {token[0]}' >/var/lib/netrc",
    )
    hello, noise = builder.succeed("nix-build --no-out-link /etc/contents.nix -A hello -A noise").split()
    copy = "nix --extra-experimental-features nix-command copy --to 'https://server/push"

    with subtest("an unsigned path is refused with the remedy"):
        refusal = builder.fail(f"{copy}' {hello} 2>&1")
        assert "secret-key=FILE" in refusal, refusal
        server.fail(f"test -e {hello}")

    with subtest("signed paths are pushed, also a large one"):
        builder.succeed(f"{copy}?secret-key=/etc/builder.secret&compression=zstd' {hello} {noise} >&2")
        server.succeed(f"nix-store --verify-path {hello} {noise}")

    with subtest("a third machine substitutes what was pushed, after the builder has collected it"):
        # The daemon may keep the temporary roots of `nix copy` for a moment longer.
        builder.wait_until_succeeds(f"nix-store --gc >&2; test ! -e {noise}", timeout=60)
        client.succeed(f"nix-store --realise {hello} {noise} >&2", f"{hello}/bin/hello >&2")

    with subtest("the server keeps a pushed path until its root is dropped"):
        server.succeed("systemctl restart harmonia.service")  # ends the temporary roots
        server.fail(f"nix-store --delete {noise} >&2")
        listed = server.succeed("harmonia roots list")
        assert noise in listed, listed
        server.succeed(f"harmonia roots drop {noise}")
        server.wait_until_succeeds(f"nix-store --delete {noise} >&2", timeout=60)
        server.fail(f"nix-store --delete {hello} >&2")
  '';
}

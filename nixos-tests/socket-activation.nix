# systemd starts Harmonia at the first connection, which comes through nginx with TLS and a unix socket.
{ lib, ... }:
{
  name = "harmonia-socket-activation";

  nodes.server = {
    imports = [ ./lab/nginx-server.nix ];
    # Only the socket starts the service.
    systemd.services.harmonia.wantedBy = lib.mkForce [ ];
  };

  nodes.client.imports = [ ./lab/tls-client.nix ];

  testScript = ''
    start_all()
    server.wait_for_unit("harmonia.socket")
    server.wait_for_unit("nginx.service")
    server.wait_for_open_port(443)
    hello, names = server.succeed("nix-build --no-out-link /etc/contents.nix -A hello -A names").split()

    with subtest("the service does not run yet"):
        server.require_unit_state("harmonia.service", "inactive")
        server.fail("nc -z localhost 5000")

    with subtest("only nginx can open the socket"):
        server.succeed("test $(stat --format=%a:%G /run/harmonia/socket) = 660:nginx")

    with subtest("the first request starts the service, and gets a response"):
        client.succeed("curl --fail --silent --show-error --cacert /etc/server.pem https://server/nix-cache-info >&2")
        server.wait_for_unit("harmonia.service")

    with subtest("a client substitutes through nginx"):
        client.succeed(f"nix-store --realise {hello} >&2")
        client.succeed(f"{hello}/bin/hello >&2")
        client.succeed(
            "curl --fail --silent --head --http2 --cacert /etc/server.pem https://server/nix-cache-info | grep HTTP/2 >&2"
        )

    with subtest("the access log shows the address of the client"):
        addresses = {line.split()[0] for line in server.succeed("getent ahosts client").splitlines()}
        patterns = "".join(f" --regexp=' {address} '" for address in addresses)
        server.wait_until_succeeds(
            f"journalctl --unit=harmonia.service | grep --fixed-strings {patterns} >&2", timeout=60
        )

    with subtest("after a stop, the socket starts the service again"):
        server.succeed("systemctl stop harmonia.service")
        client.succeed(f"nix-store --realise {names} >&2")
        client.succeed(f"nix-store --verify-path {names}")
        server.wait_for_unit("harmonia.service")
  '';
}

# A machine writes its paths to a bucket, a server without a store serves them, and Nix reads the bucket itself.
{ lib, ... }:
let
  key = (import ./lab/keys.nix).one;
  deployed = "/var/lib/deployed 100%n $HOME";
  access = "mirror-key:mirror-secret-of-this-test";
  bucket = {
    endpoint = "http://s3:8333";
    bucket = "cache";
    credentials_file = "/etc/s3.secret";
  };
  withAccess.environment.etc."s3.secret" = {
    text = "${access}\n";
    mode = "0400";
  };
in
{
  name = "harmonia-mirror";

  nodes.s3 =
    { pkgs, ... }:
    {
      networking.firewall.allowedTCPPorts = [ 8333 ];
      environment.etc."s3.json".text = builtins.toJSON {
        identities = [
          {
            name = "writer";
            credentials = [
              {
                accessKey = lib.head (lib.splitString ":" access);
                secretKey = lib.last (lib.splitString ":" access);
              }
            ];
            actions = [
              "Admin"
              "Read"
              "Write"
              "List"
              "Tagging"
            ];
          }
          {
            name = "anonymous";
            actions = [ "Read:cache" ];
          }
        ];
      };
      systemd.services.seaweedfs = {
        wantedBy = [ "multi-user.target" ];
        serviceConfig = {
          StateDirectory = "seaweedfs";
          WorkingDirectory = "/var/lib/seaweedfs";
          ExecStart = toString [
            "${pkgs.seaweedfs}/bin/weed server -dir=/var/lib/seaweedfs -ip=127.0.0.1 -ip.bind=0.0.0.0"
            "-master.telemetry=false -volume.max=0 -master.volumeSizeLimitMB=64 -filer"
            "-s3 -s3.port=8333 -s3.config=/etc/s3.json -s3.port.iceberg=0"
          ];
        };
      };
    };

  nodes.builder = {
    imports = [
      ./lab/server.nix
      withAccess
    ];
    services.harmonia = {
      settings.mirror = bucket // {
        write_served = true;
      };
      mirror.roots = [ deployed ];
      mirror.keep = "90d";
    };
  };

  nodes.server = {
    imports = [ withAccess ];
    services.harmonia = {
      enable = true;
      openFirewall = true;
      settings = {
        local_store = false;
        mirror = bucket // {
          public_keys = [ key.public ];
        };
      };
    };
  };

  nodes.client.imports = [ ./lab/client.nix ];

  testScript = ''
    start_all()
    s3.wait_for_unit("seaweedfs.service")
    s3.wait_for_open_port(8333)
    s3.wait_until_succeeds("curl --fail --silent http://localhost:8333/healthz")
    builder.wait_for_unit("harmonia.service")
    server.wait_for_unit("harmonia.service")
    hello, noise = builder.succeed("nix-build --no-out-link /etc/contents.nix -A hello -A noise").split()
    asked = "curl --fail --silent --show-error --output /dev/null"

    with subtest("the roots are written, and nothing is old"):
        builder.succeed(f"ln -s {hello} '${deployed}'", "systemctl start harmonia-mirror.service")
        builder.wait_until_succeeds(
            "journalctl --unit=harmonia-mirror.service --output=cat | grep '0 narinfos' >&2", timeout=60
        )
        builder.succeed("systemctl list-timers --all | grep harmonia-mirror.timer >&2")
        client.succeed(f"{asked} http://s3:8333/cache/{hello[11:43]}.narinfo")
        client.fail(f"{asked} http://s3:8333/cache/{noise[11:43]}.narinfo")

    with subtest("what a client downloads is written"):
        url = builder.succeed(f"curl --fail --silent http://localhost:5000/{noise[11:43]}.narinfo | grep '^URL: '")
        client.succeed(f"{asked} http://builder:5000/{url.split()[1]}")
        client.wait_until_succeeds(f"{asked} http://s3:8333/cache/{noise[11:43]}.narinfo")
        builder.wait_until_succeeds(
            "curl --fail --silent 'http://localhost:5000/health?verbose' | grep 'mirror writes: up' >&2", timeout=60
        )

    with subtest("a server without a store serves the closure after the builder has stopped"):
        builder.succeed("systemctl stop harmonia.socket harmonia.service")
        client.succeed(f"nix-store --realise {hello} >&2")
        client.succeed(f"{hello}/bin/hello >&2")
        server.fail(f"test -e {hello}")

    with subtest("Nix reads the bucket without any Harmonia"):
        server.succeed("systemctl stop harmonia.socket harmonia.service")
        client.fail(f"{asked} http://server:5000/nix-cache-info")
        client.succeed(f"nix-store --realise {noise} --option substituters http://s3:8333/cache >&2")
        client.succeed(f"nix-store --verify-path {hello} {noise}")
  '';
}

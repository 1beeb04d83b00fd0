# A machine with what Hydra leaves behind: GC roots, logs in its own directory, and other paths in the store.
# Only what Hydra's roots keep is served, with its logs. Hydra itself is not installed.
{
  name = "harmonia-hydra";
  nodes.server = {
    imports = [ ./lab/server.nix ];
    # As in Hydra's NixOS module: only members of the group hydra may enter /var/lib/hydra.
    users.groups.hydra = { };
    users.users.hydra = {
      isSystemUser = true;
      group = "hydra";
    };
    systemd.services.harmonia.serviceConfig.SupplementaryGroups = [ "hydra" ];
    services.harmonia.settings = {
      log_dir = "/var/lib/hydra/build-logs";
      log_redirect = "http://hydra.example.org/log";
      publish.gc_roots = [ "/nix/var/nix/gcroots/hydra" ];
    };
  };
  nodes.client.imports = [ ./lab/client.nix ];

  testScript = ''
    start_all()
    server.wait_for_unit("harmonia.socket")
    server.succeed("install -d -m 750 -o hydra -g hydra /var/lib/hydra")
    server.succeed("install -d -m 755 -o hydra -g hydra /var/lib/hydra/build-logs /nix/var/nix/gcroots/hydra")
    hello, text, names = server.succeed(
        "nix-build --no-out-link /etc/contents.nix -A hello -A text -A names"
    ).split()
    derivation = {
        path: server.succeed(f"nix-store --query --deriver {path}").strip().removeprefix("/nix/store/")
        for path in (hello, text, names)
    }


    def finish(path, compress):
        """Leave a root and a log, as Hydra does after a build (Helper/Nix.pm, Plugin/CompressLog.pm)."""
        drv = derivation[path]
        directory, log = f"/var/lib/hydra/build-logs/{drv[:2]}", f"/var/lib/hydra/build-logs/{drv[:2]}/{drv[2:]}"
        server.succeed(
            f"touch /nix/var/nix/gcroots/hydra/{path.removeprefix('/nix/store/')}",
            f"install -d -m 755 -o hydra -g hydra {directory}",
            f"echo 'Hydra built {drv}' >{log}",
            f"{compress} {log}",
        )


    # Hydra compresses with bzip2, or zstd if configured; the log of an interrupted step is plain.
    finish(hello, "bzip2")
    finish(text, "true")
    server.succeed("systemctl restart harmonia.service")

    with subtest("what Hydra's roots keep is served, with its closure"):
        client.wait_until_succeeds("curl --fail --silent --show-error http://server:5000/nix-cache-info >&2")
        client.succeed(f"nix-store --realise {hello} {text} >&2", f"{hello}/bin/hello >&2")

    with subtest("other paths of the store are not served"):
        server.succeed(f"test -e {names}")
        client.fail(f"nix-store --realise {names} >&2")

    with subtest("Hydra's logs are served"):
        for path in hello, text:
            log = client.succeed(f"curl --fail --silent http://server:5000/log/{derivation[path]}")
            assert log == f"Hydra built {derivation[path]}\n", log
            log = client.succeed(f"nix --extra-experimental-features nix-command log --store http://server:5000 {path}")
            assert "Hydra built" in log, log

    with subtest("other logs are redirected to Hydra"):
        where = client.succeed(
            f"curl --silent --output /dev/null --write-out '%{{redirect_url}}' http://server:5000/log/{derivation[names]}"
        )
        assert where == f"http://hydra.example.org/log/{derivation[names]}", where

    with subtest("a build that Hydra finishes later is served without a restart"):
        finish(names, "zstd --rm --quiet")
        client.wait_until_succeeds(f"nix-store --realise {names} --option narinfo-cache-negative-ttl 0 >&2")
        # Each worker looks at the roots again within some seconds.
        log = client.wait_until_succeeds(
            f"curl --fail --silent http://server:5000/log/{derivation[names]} | grep Hydra"
        )
        assert log == f"Hydra built {derivation[names]}\n", log
  '';
}

# A NAR is compressed once and sent compressed. The second download comes from the cache.
{
  name = "harmonia-compression";
  nodes.server = {
    imports = [ ./lab/server.nix ];
    # Counters of other workers would arrive a few seconds late.
    services.harmonia.settings.workers = 1;
  };
  nodes.client =
    { pkgs, ... }:
    {
      imports = [ ./lab/client.nix ];
      environment.systemPackages = [ pkgs.zstd ];
    };

  testScript = ''
    import re


    def metric(name: str) -> float:
        found = re.search(
            rf"^{re.escape(name)} (\S+)$",
            server.succeed("curl --fail --silent http://localhost:5000/metrics"),
            re.MULTILINE,
        )
        assert found, name
        return float(found[1])


    def wait_for_metric(name: str, value: float) -> None:
        server.wait_until_succeeds(
            f"curl --fail --silent http://localhost:5000/metrics | grep --extended-regexp '^{name} {value}$'", timeout=60
        )


    start_all()
    server.wait_for_unit("harmonia.service")
    server.wait_for_open_port(5000)
    client.wait_until_succeeds("curl --fail --silent --show-error http://server:5000/nix-cache-info >&2")
    text = server.succeed("nix-build --no-out-link /etc/contents.nix -A text").strip()
    nar_size = int(server.succeed(f"nix-store --query --size {text}"))
    narinfo_url = f"http://server:5000/{text.removeprefix('/nix/store/')[:32]}.narinfo"
    client.fail(f"test -e {text}")

    with subtest("a client downloads the compressed NAR"):
        client.succeed(f"nix-store --realise {text} >&2")
        client.succeed(f"nix-store --verify-path {text}")
        # The client has the NAR before the file is on the disk, where each worker finds its size.
        shown = client.wait_until_succeeds(
            f"curl --fail --silent {narinfo_url} >/tmp/narinfo && grep --quiet '^FileSize: ' /tmp/narinfo"
            " && cat /tmp/narinfo",
            timeout=60,
        )
        narinfo = dict(line.split(": ", 1) for line in shown.splitlines())
        assert narinfo["Compression"] == "zstd"
        assert narinfo["URL"].endswith(".nar.zst")
        file_size = int(narinfo["FileSize"])
        assert file_size < nar_size / 3, (file_size, nar_size)

    with subtest("the server sent FileSize bytes"):
        sent = server.wait_until_succeeds(
            f"journalctl --unit=harmonia.service | grep --fixed-strings 'GET /{narinfo['URL']}'", timeout=60
        )
        assert f" 200 {file_size} " in sent, sent
        wait_for_metric("harmonia_cache_fills_total", 1.0)

    with subtest("the next download comes from the cache, unchanged"):
        hits = metric("harmonia_cache_hits_total")
        client.succeed(f"curl --fail --silent --output /tmp/text.nar.zst http://server:5000/{narinfo['URL']}")
        assert int(client.succeed("stat --format=%s /tmp/text.nar.zst")) == file_size
        assert client.succeed("zstd --decompress --stdout /tmp/text.nar.zst | sha256sum") == server.succeed(
            f"nix-store --dump {text} | sha256sum"
        )
        wait_for_metric("harmonia_cache_hits_total", hits + 1)
        assert metric("harmonia_cache_fills_total") == 1
  '';
}

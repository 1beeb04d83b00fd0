# A client that requires signatures substitutes paths that the server built, and reads their listings, logs and files.
{
  name = "harmonia-basic";
  nodes.server.imports = [ ./lab/server.nix ];
  nodes.client.imports = [ ./lab/client.nix ];

  testScript = ''
    import json


    def hash_part(path: str) -> str:
        return path.removeprefix("/nix/store/")[:32]


    start_all()
    server.wait_for_unit("harmonia.service")
    server.wait_for_open_port(5000)
    client.wait_until_succeeds("curl --fail --silent --show-error http://server:5000/nix-cache-info >&2")

    greeting, hello, names = server.succeed(
        "nix-build --no-out-link /etc/contents.nix -A greeting -A hello -A names"
    ).split()

    with subtest("the client has none of the paths"):
        for path in greeting, hello, names:
            client.fail(f"test -e {path}")

    with subtest("the client substitutes the paths, checks the signatures, and runs the program"):
        client.succeed(f"nix-store --realise {hello} {names} >&2")
        client.succeed(f"nix-store --verify-path {greeting} {hello} {names} >&2")
        assert client.succeed(f"{hello}/bin/hello") == server.succeed(f"cat {greeting}")
        assert client.succeed(f"nix-store --dump {names} | sha256sum") == server.succeed(
            f"nix-store --dump {names} | sha256sum"
        )

    with subtest("the client downloaded the NARs from the server"):
        for path in greeting, hello, names:
            server.wait_until_succeeds(
                f"journalctl --unit=harmonia.service | grep --fixed-strings '/nar/{hash_part(path)}-'", timeout=60
            )

    with subtest("the NAR listing shows the program"):
        listing = json.loads(client.succeed(f"curl --fail --silent http://server:5000/{hash_part(hello)}.ls"))
        assert listing["root"]["entries"]["bin"]["entries"]["hello"]["executable"]

    with subtest("the server returns the build log"):
        drv = server.succeed(f"nix-store --query --deriver {greeting}").strip().removeprefix("/nix/store/")
        assert client.succeed(f"curl --fail --silent http://server:5000/log/{drv}") == "building a greeting\n"

    with subtest("the server returns single files, even with names that are not UTF-8"):
        served = f"curl --fail --silent http://server:5000/serve/{hash_part(names)}"
        for name, url in (
            ("grüße-日本-😀", "gr%C3%BC%C3%9Fe-%E6%97%A5%E6%9C%AC-%F0%9F%98%80"),
            (r"$(printf 'not-UTF-8-\377\376')", "not-UTF-8-%FF%FE"),
            ("with space & 100%", "with%20space%20%26%20100%25"),
        ):
            assert client.succeed(f"{served}/{url}") == server.succeed(f'cat "{names}/{name}"')
        client.succeed(f"{served}/ | grep --fixed-strings not-UTF-8-%FF%FE >&2")

    with subtest("a missing path returns 404"):
        client.succeed(
            "curl --silent --output /dev/null --write-out '%{http_code}'"
            " http://server:5000/00000000000000000000000000000000.narinfo | grep 404 >&2"
        )
  '';
}

"""Nix itself is the judge of the narinfos that our parser is tested with."""

from support import narinfos
from support.nix_client import Client


def test_nix_takes_and_refuses_the_narinfos_of_our_tests(client: Client) -> None:
    for table, taken in ((narinfos.TAKEN, True), (narinfos.REFUSED, False)):
        for number, (name, text) in enumerate(table.items()):
            inside = f"/tmp/{taken}-{number}"  # in the client's own root; each URL has its own entry in Nix's cache
            cache = client.directory / inside[1:]
            cache.mkdir(parents=True)
            (cache / "nix-cache-info").write_text("StoreDir: /nix/store\n")
            (cache / "1dvdsyn9d7z6wfrkpxw28nj59kflfxyz.narinfo").write_bytes(text.encode())
            done = client.run("nix", "path-info", "--store", f"file://{inside}", narinfos.PATH, check=False)
            assert (done.returncode == 0) is taken, name

"""Nix accepts and rejects the narinfos with which our parser is tested."""

from support import narinfos
from support.nix_client import Client

_STATUSES = """
for cache in /tmp/caches/*; do
  nix path-info --store "file://$cache" "$0" >/dev/null 2>&1 && echo "$cache 0" || echo "$cache $?"
done
"""


def test_nix_accepts_and_rejects_the_narinfos_of_our_tests(client: Client) -> None:
    """Each URL has its own entry in the cache of Nix. All commands run on one machine to save time."""
    texts = narinfos.ACCEPTED | narinfos.REJECTED
    for number, text in enumerate(texts.values()):
        cache = client.directory / f"tmp/caches/{number:03}"
        cache.mkdir(parents=True)
        (cache / "nix-cache-info").write_text("StoreDir: /nix/store\n")
        (cache / "1dvdsyn9d7z6wfrkpxw28nj59kflfxyz.narinfo").write_bytes(text.encode())
    statuses = [int(line.split()[1]) for line in client.run("sh", "-c", _STATUSES, narinfos.PATH).lines]
    taken = {name for name, status in zip(texts, statuses, strict=True) if status == 0}
    assert taken == narinfos.ACCEPTED.keys()
    assert set(statuses) == {0, 1, 134}  # some abort Nix by an unexpected exception

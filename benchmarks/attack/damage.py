"""Attack on the cache: a NAR is damaged on disk after it was checked."""

import http.client
import random
from hashlib import sha256

from benchmarks.attack.arena import Arena
from support.disk_cache import cached_file, flip
from support.running import file_url, unpacked

_DOWNLOADS = 80
_BROKEN = (http.client.IncompleteRead, ConnectionResetError)


def damaged_cache(arena: Arena) -> None:
    """Flip a byte of the cached file, keep its size and times, and download it, many times."""
    info = arena.store.random
    url = file_url(info)
    chance = random.Random(1)
    name = f"a cached NAR damaged before each of {_DOWNLOADS} downloads"
    with arena.attacked(name, unharmed=[info]) as (server, outcome):
        for _ in range(_DOWNLOADS):
            whole = server.get(url).body
            assert sha256(unpacked(whole)).digest() == info.nar_hash
            file = cached_file(server.cache_dir)
            flip(file, chance.randrange(file.stat().st_size))
            try:
                answer = server.get(url)
            except _BROKEN:
                outcome.counts["ended early"] += 1
            else:
                outcome.counts[str(answer.status)] += 1
                # A file with a damaged trailer is not complete, and is made again at once.
                outcome.require(answer.status == 503 or answer.body == whole, "a damaged NAR was served completely")


ALL = [damaged_cache]

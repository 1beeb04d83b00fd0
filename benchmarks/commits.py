"""Writer that commits to a Nix database again and again, like builds: python -m benchmarks.commits DATABASE."""

import sqlite3
import sys
import time
from itertools import count

from harmonia.nix import base32

PER_SECOND = 20


def main() -> None:
    with sqlite3.connect(sys.argv[1], isolation_level=None) as database:
        for number in count():
            hash_part = base32.encode((1 << 100 | number).to_bytes(20, "little"))
            database.execute(
                "insert or replace into ValidPaths (path, hash, registrationTime, narSize) values (?, ?, 1, 1000)",
                (f"/nix/store/{hash_part}-built", f"sha256:{'0' * 64}"),
            )
            time.sleep(1 / PER_SECOND)


if __name__ == "__main__":
    main()

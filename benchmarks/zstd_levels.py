"""Size and speed of zstd on NARs at several settings: prints the table of docs/explanation/benchmarks.md.

    python benchmarks/zstd_levels.py [DIRECTORY…]

Each directory becomes a NAR, which one thread compresses in our frames, and in a single frame, as `zstd` does. Seconds
are CPU time, the best of three runs, so other load on the machine has little effect.
"""

import os
import sys
import time

import zstandard

from harmonia.cache.zstd import Encoding
from harmonia.config.tables.zstd import Zstd
from harmonia.store import file_reader, tree_reader

DIRECTORIES = ["/usr/lib/python3", "/usr/share/locale", "/usr/lib/gcc", "/usr/share/perl", "/usr/bin"]
SETTINGS = [
    *(Zstd(level=level) for level in (1, 2, 3, 5, 7)),
    Zstd(level=3, window_log=23),
    *(Zstd(level=level, long_distance_matching=True, window_log=log) for level in (1, 3) for log in (25, 27)),
]
MB = 1_000_000


def compress(encoding: Encoding, pieces: list[bytes]) -> tuple[int, float]:
    """Return the compressed size in bytes, and the CPU seconds of the best run."""
    runs = []
    for _ in range(3):
        began = time.process_time()
        size = sum(len(encoding.compress(piece)) for piece in pieces)
        runs.append(time.process_time() - began)
    return size, min(runs)


def row(settings: Zstd, nars: list[bytes]) -> str:
    encoding = Encoding.of(settings)
    step = encoding.frame_size
    total = sum(map(len, nars))
    ours, seconds = compress(encoding, [data[at : at + step] for data in nars for at in range(0, len(data), step)])
    single, single_seconds = compress(encoding, nars)
    cells = [
        f"{settings.level}{', long distance' if settings.long_distance_matching else ''}",
        str(zstandard.get_frame_parameters(encoding.compress(bytes(2 * step))).window_size // 2**20 or "½"),
        str(step // 2**20),
        *(f"{total / ours:.3f}", f"{seconds:.1f}", f"{total / MB / seconds:.0f}"),
        *(f"{total / single:.3f}", f"{single_seconds:.1f}", f"{100 * (ours / single - 1):+.1f} %"),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    directories = sys.argv[1:] or list(filter(os.path.isdir, DIRECTORIES))
    nars = [b"".join(file_reader.read(tree_reader.dump(os.fsencode(directory)))) for directory in directories]
    library = ".".join(map(str, zstandard.ZSTD_VERSION))
    print(f"NARs of {', '.join(directories)}: {sum(map(len, nars)) / 2**20:.0f} MiB; libzstd {library}\n")
    print("| level | window, MiB | frame, MiB | ratio | CPU s | MB/s | one frame: ratio | CPU s | ours is larger by |")
    print("|---|---|---|---|---|---|---|---|---|")
    for settings in SETTINGS:
        print(row(settings, nars), flush=True)


if __name__ == "__main__":
    main()

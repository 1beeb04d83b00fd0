"""Size and time of xz and zstd on NARs: prints the table of docs/explanation/benchmarks.md.

    python benchmarks/xz_or_zstd.py [DIRECTORY…]

Each directory becomes a NAR, which one thread compresses and unpacks. Seconds are CPU time, the best of three runs, so
other load on the machine has little effect. zstd makes our frames; xz makes one stream, as `nix copy` does.

The times at a bandwidth are calculated. A client unpacks while it downloads, and a server can compress while it sends,
so each is the time of the slowest step.
"""

import lzma
import os
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import zstandard

from harmonia.cache.zstd import Encoding
from harmonia.config.tables.zstd import Zstd
from harmonia.store import file_reader, tree_reader

DIRECTORIES = ["/usr/lib/python3", "/usr/sbin"]
MEGABITS = (10, 100, 1000)
MB = 1_000_000
_RUNS = 3


class Method(NamedTuple):
    name: str
    compress: Callable[[bytes], bytes]
    unpack: Callable[[bytes], bytes]


def zstd(level: int) -> Method:
    encoding = Encoding.of(Zstd(level=level))

    def compress(nar: bytes) -> bytes:
        step = encoding.frame_size
        return b"".join(encoding.compress(nar[at : at + step]) for at in range(0, len(nar), step))

    def unpack(file: bytes) -> bytes:
        return zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True).read()

    return Method(f"zstd {level}", compress, unpack)


def xz(preset: int) -> Method:
    return Method(f"xz {preset}", lambda nar: lzma.compress(nar, preset=preset), lzma.decompress)


METHODS = [Method("none", bytes, bytes), *map(zstd, (1, 3, 9, 19)), xz(6)]
"""3 is the default of `zstd.level`, 6 that of xz, and so of `nix copy`."""


def best(function: Callable[[bytes], bytes], inputs: list[bytes]) -> tuple[list[bytes], float]:
    """Return the outputs, and the CPU seconds of the best run."""
    runs = []
    for _ in range(_RUNS):
        began = time.process_time()
        outputs = [function(each) for each in inputs]
        runs.append(time.process_time() - began)
    return outputs, min(runs)


def row(method: Method, nars: list[bytes]) -> str:
    """Return the line of a method: size, ratio, times to make and unpack, and times at each bandwidth.

    The first time at a bandwidth is that of a file that was made before, the second that of one made meanwhile.
    """
    if method.name == "none":
        files, make, unpack = nars, 0.0, 0.0
    else:
        files, make = best(method.compress, nars)
        unpacked, unpack = best(method.unpack, files)
        assert unpacked == nars
    size = sum(map(len, files))
    cells = [method.name, f"{size / MB:.1f}", f"{sum(map(len, nars)) / size:.2f}", f"{make:.1f}", f"{unpack:.2f}"]
    for megabits in MEGABITS:
        transfer = size * 8 / MB / megabits
        ready, fresh = max(transfer, unpack), max(transfer, unpack, make)
        cells.append(f"{ready:.1f} / {fresh:.1f}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    directories = sys.argv[1:] or list(filter(os.path.isdir, DIRECTORIES))
    nars = [b"".join(file_reader.read(tree_reader.dump(os.fsencode(directory)))) for directory in directories]
    versions = f"libzstd {'.'.join(map(str, zstandard.ZSTD_VERSION))}"
    print(f"NARs of {', '.join(directories)}: {sum(map(len, nars)) / MB:.0f} MB; {versions}")
    print(f"load average {os.getloadavg()[0]:.1f}\n")
    speeds = " | ".join(f"at {megabits:,} Mbit/s, s" for megabits in MEGABITS)
    print(f"| compression | size, MB | ratio | make, s | unpack, s | {speeds} |")
    print("|---|---|---|---|---|---|---|---|")
    for method in METHODS:
        print(row(method, nars), flush=True)


if __name__ == "__main__":
    main()

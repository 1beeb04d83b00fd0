"""Size of new versions of packages as deltas to the old ones, for real pairs. Prints tables.

    python -m benchmarks.deltas DIRECTORY [PAIRS]

Pairs are two versions of a Debian package in the suites below: `PAIRS` of each kind of change, one for each source
package, in the order of a hash of its name. The packages (some GB) and the results stay in DIRECTORY for the next run.
Needs the network, dpkg-deb, and the package backports.zstd: a delta is zstd with the old NAR as a prefix (RFC 9842),
which python-zstandard cannot set.

Each package becomes a NAR. At each level, the new one is compressed

- as it is;
- with the whole old NAR as its prefix;
- by files: each file of at least 32 KiB with the old file of the same name, but for digits, as its prefix, and all
  other bytes with those of the old NAR.

Seconds are processor time of one thread.
"""

import hashlib
import json
import lzma
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
from backports import zstd

from harmonia.nix.nar import FileSlice
from harmonia.store import file_reader, tree_reader

MIRROR = "http://deb.debian.org"
SUITES = {
    "bookworm": "debian",
    "bookworm-security": "debian-security",
    "bookworm-backports": "debian",
    "trixie": "debian",
    "trixie-security": "debian-security",
    "trixie-backports": "debian",
    "sid": "debian",
}
STEPS = [
    ("bookworm", "bookworm-security"),
    ("trixie", "trixie-security"),
    ("trixie", "sid"),
    ("bookworm", "bookworm-backports"),
    ("trixie", "trixie-backports"),
    ("bookworm", "trixie"),
]
KINDS = ["rebuild", "security update", "package revision", "patch release", "minor release", "major release"]
SIZES = range(256 << 10, 96 << 20)  # bytes of the installed files
OWN_PIECE = 32 << 10  # bytes of a file from which on it is a piece of its own
LEVELS = [3, 9, 12]
FORMS = {"plain": "the NAR", "whole": "delta to the NAR", "files": "delta by files"}
DICTIONARY_MIN_BYTES = 8  # less is not a dictionary
MIB = 1 << 20


@dataclass(frozen=True)
class Package:
    name: str
    source: str
    version: str
    installed: int
    """Bytes."""
    url: str


@dataclass(frozen=True)
class Coded:
    """A NAR that was compressed, and decompressed again."""

    size: int
    """Bytes."""
    encode: float
    """Seconds of processor time."""
    decode: float


@dataclass(frozen=True)
class Pair:
    kind: str
    name: str
    old: str
    new: str
    nar: int
    """Bytes."""
    coded: dict[str, Coded]
    """The results by level and form, such as `3 plain`."""


def packages(suite: str, directory: Path) -> dict[str, Package]:
    """Return the packages of a suite by name."""
    archive = f"{MIRROR}/{SUITES[suite]}"
    index = fetched(f"{archive}/dists/{suite}/main/binary-amd64/Packages.xz", directory / f"{suite}.xz")
    found = {}
    for paragraph in lzma.decompress(index.read_bytes()).decode().split("\n\n"):
        fields: dict[str, str] = dict(re.findall(r"^([A-Za-z-]+): (.*)$", paragraph, re.MULTILINE))
        if fields:
            name = fields["Package"]
            source = fields.get("Source", name).split()[0]
            installed = int(fields.get("Installed-Size", 0)) << 10
            found[name] = Package(name, source, fields["Version"], installed, f"{archive}/{fields['Filename']}")
    return found


def fetched(url: str, file: Path) -> Path:
    if not file.exists():
        partial = file.with_suffix(".part")
        urllib.request.urlretrieve(url, partial)
        partial.rename(file)
    return file


def kind(old: str, new: str, suite: str) -> str | None:
    """Return what kind of change leads from one version to the other."""
    base, new_base = (re.sub(r"\+b\d+$", "", version) for version in (old, new))
    if base == new_base:
        return "rebuild" if old != new else None
    if suite.endswith("security"):
        return "security update"
    upstream, new_upstream = (re.sub(r"^\d+:", "", version).rpartition("-")[0] for version in (base, new_base))
    if upstream == new_upstream:
        return "package revision"
    numbers, new_numbers = (re.findall(r"\d+", version) for version in (upstream, new_upstream))
    for level, number, new_number in zip(("major", "minor"), numbers, new_numbers, strict=False):
        if number != new_number:
            return f"{level} release"
    return "patch release"


def pairs(directory: Path, count: int) -> Iterator[tuple[str, Package, Package]]:
    """Yield the kind of each pair, and its packages."""
    suites = {suite: packages(suite, directory) for suite in SUITES}
    found: dict[str, dict[str, tuple[Package, Package]]] = {change: {} for change in KINDS}
    for before, after in STEPS:
        for name, new in suites[after].items():
            old = suites[before].get(name)
            if old and old.installed in SIZES and new.installed in SIZES:
                change = kind(old.version, new.version, after)
                if change:
                    found[change].setdefault(new.source, (old, new))
    for change in KINDS:
        order = sorted(found[change], key=lambda source: hashlib.sha256(source.encode()).digest())
        for source in order[:count]:
            yield change, *found[change][source]


def archive(package: Package, directory: Path) -> tuple[bytes, dict[str, bytes]]:
    """Return the NAR of a package, and its pieces by name; the piece `rest` has everything that is in no other."""
    deb = fetched(package.url, directory / Path(package.url).name)
    pieces: dict[str, bytes] = {}
    rest = bytearray()
    with tempfile.TemporaryDirectory(dir=directory) as root:
        subprocess.run(["dpkg-deb", "-x", deb, root], check=True)
        for segment in tree_reader.dump(root.encode()):
            if isinstance(segment, FileSlice) and segment.stop - segment.start >= OWN_PIECE:
                name = re.sub(r"\d+(\.\d+)*", "#", segment.path.decode(errors="replace").removeprefix(root))
                pieces[name] = pieces.get(name, b"") + Path(segment.path.decode(errors="surrogateescape")).read_bytes()
            else:
                rest += b"".join(file_reader.read([segment]))
        nar = b"".join(file_reader.read(tree_reader.dump(root.encode())))
    return nar, {**pieces, "rest": bytes(rest)}


def coded(parts: list[tuple[bytes, bytes]], level: int) -> Coded:
    """Compress each part with its prefix, decompress it again and compare."""
    size, encode, decode = 0, 0.0, 0.0
    for data, prefix in parts:
        dictionary = zstd.ZstdDict(prefix, is_raw=True).as_prefix if len(prefix) >= DICTIONARY_MIN_BYTES else None
        options: dict[int, int] = {zstd.CompressionParameter.compression_level: level}
        if dictionary:  # what `zstd --patch-from` sets
            options[zstd.CompressionParameter.window_log] = max(17, min(27, (len(data) + len(prefix)).bit_length()))
            options[zstd.CompressionParameter.enable_long_distance_matching] = 1
        began = time.process_time()
        compressor = zstd.ZstdCompressor(options=options, zstd_dict=dictionary)
        result = compressor.compress(data, zstd.ZstdCompressor.FLUSH_FRAME)
        encode += time.process_time() - began
        began = time.process_time()
        window: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 27}
        assert zstd.ZstdDecompressor(zstd_dict=dictionary, options=window).decompress(result) == data
        decode += time.process_time() - began
        size += len(result)
    return Coded(size, encode, decode)


def measure(change: str, old: Package, new: Package, directory: Path) -> Pair:
    before, old_pieces = archive(old, directory)
    after, new_pieces = archive(new, directory)
    forms = {
        "plain": [(after, b"")],
        "whole": [(after, before)],
        "files": [(data, old_pieces.get(name, b"")) for name, data in new_pieces.items()],
    }
    results = {f"{level} {form}": coded(parts, level) for level in LEVELS for form, parts in forms.items()}
    return Pair(change, new.name, old.version, new.version, len(after), results)


def table(measured: list[Pair]) -> Iterator[str]:
    """Yield a table of the kinds of change at the first level, and one of all pairs at each level."""
    yield "| change | pairs | NARs, MiB | zstd, MiB | delta to the NAR | by files | of the median pair |"
    yield "|---|---|---|---|---|---|---|"
    first = LEVELS[0]
    for change in [*KINDS, "all"]:
        some = [pair for pair in measured if change in (pair.kind, "all")]
        plain, whole, files = (sum(pair.coded[f"{first} {form}"].size for pair in some) for form in FORMS)
        median = statistics.median(
            pair.coded[f"{first} whole"].size / pair.coded[f"{first} plain"].size for pair in some
        )
        nars = sum(pair.nar for pair in some)
        yield (
            f"| {change} | {len(some)} | {nars / MIB:.0f} | {plain / MIB:.1f} "
            f"| {whole / plain:.1%} | {files / plain:.1%} | {median:.1%} |"
        )
    yield ""
    yield f"| level | form | MiB | of zstd at level {first} | of zstd at this level | encode, s | decode, s |"
    yield "|---|---|---|---|---|---|---|"
    base = sum(pair.coded[f"{first} plain"].size for pair in measured)
    for level in LEVELS:
        plain = sum(pair.coded[f"{level} plain"].size for pair in measured)
        for form, name in FORMS.items():
            each = [pair.coded[f"{level} {form}"] for pair in measured]
            size = sum(one.size for one in each)
            yield (
                f"| {level} | {name} | {size / MIB:.1f} | {size / base:.1%} | {size / plain:.1%} "
                f"| {sum(one.encode for one in each):.1f} | {sum(one.decode for one in each):.1f} |"
            )


def main() -> None:
    directory = Path(sys.argv[1])
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 50
    directory.mkdir(exist_ok=True)
    results = directory / "results.json"
    known = json.loads(results.read_text()) if results.exists() else {}
    for change, old, new in pairs(directory, count):
        if old.url + new.url not in known:
            known[old.url + new.url] = asdict(measure(change, old, new, directory))
            results.write_text(json.dumps(known, indent=1))
    print("\n".join(table(msgspec.convert(list(known.values()), list[Pair]))))


if __name__ == "__main__":
    main()

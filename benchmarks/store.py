"""Store of the benchmarks: created once from files of this machine, and kept for the next run.

Each installed Debian package becomes a store path with the package's files and references to its dependencies. On
machines without dpkg, the paths of the machine's own store are used. All content is real.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path

from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey
from harmonia.nix.store_path import StorePath
from harmonia.store.store import Store
from harmonia.tools.fixture_tree import Tree, remove_tree
from harmonia.tools.store_builder import StoreBuilder

MIB = 1 << 20
_VERSION = 1  # increase it to create the store again
_STORE_DIR = "/nix/store"
_SMALL = 16 * 1024  # bytes, the largest of the many small files


@dataclass(frozen=True)
class Form:
    """Size of the benchmark."""

    name: str
    closure: int
    """Approximate bytes of the files in the packages."""
    many: int
    """Number of files in the path of many small files."""
    large: int
    """Bytes of the single file."""
    valid_paths: int
    """Number of paths in the large database."""
    rounds: int
    """Number of measurements of each figure."""
    seconds: int
    """Duration of a run of `wrk`."""

    @property
    def few_rounds(self) -> int:
        """Number of measurements of slow figures."""
        return (self.rounds + 1) // 2


FULL = Form("full", 1300 * MIB, 100_000, 4096 * MIB, 1_000_000, 5, 2)
SHORT = Form("short", 60 * MIB, 5_000, 256 * MIB, 100_000, 5, 1)


@dataclass(frozen=True)
class Package:
    name: str
    files: Collection[str]
    references: Sequence[str]
    """Names of other packages."""

    @property
    def size(self) -> int:
        return sum(os.lstat(file).st_size for file in self.files)

    @property
    def tree(self) -> Tree:
        tree: dict[str, Tree] = {}
        for file in self.files:
            *directories, name = file.strip("/").split("/")
            inner = tree
            for directory in directories:
                inner = inner.setdefault(directory, {})  # type: ignore[assignment]
            inner[name] = Path(file)
        return tree


def made_once(root: Path, fill: Callable[[Path], None]) -> Path:
    """Return the store directory `root`. Fills it first if it does not exist."""
    if not root.exists():
        print(f"creating the store {root}", flush=True)
        unfinished = root.with_name(f"{root.name}.unfinished")
        remove_tree(os.fsencode(unfinished))
        fill(unfinished)
        unfinished.rename(root)
    return root


class BenchStore:
    """Store of a form below `directory`. Created if it does not exist."""

    def __init__(self, directory: Path, form: Form) -> None:
        self.form = form
        self.root = made_once(directory / f"{form.name}-{_VERSION}", partial(_fill, form))
        self.key_file = self.root / "secret-key"
        self.database = self.root / "nix/var/nix/db/db.sqlite"
        self.real_dir = self.root / "nix/store"
        store = Store(_STORE_DIR, str(self.real_dir), str(self.database))
        paths = [StorePath.in_dir(_STORE_DIR, path) for path in store.valid_paths()[0]]
        infos = {path.name: info for path in paths if (info := store.path_info(path.hash_part))}
        self.many, self.large = infos.pop("many-small-files"), infos.pop("large-file")
        self.top = infos["closure"]
        """Path that refers to all packages."""
        self.closure = list(infos.values())
        """All packages, and the path that refers to them."""

    def real_path(self, info: PathInfo) -> str:
        return f"{self.real_dir}/{info.path}"

    @property
    def closure_size(self) -> int:
        """Total size of the NARs of the closure, in bytes."""
        return sum(info.nar_size for info in self.closure)


def _fill(form: Form, root: Path) -> None:
    builder = StoreBuilder(root)
    (root / "secret-key").write_text(SecretKey.generate("bench-1").export())
    (root / "secret-key").chmod(0o600)
    packages = _debian_packages() if shutil.which("dpkg-query") else _nix_packages()
    made: dict[str, StorePath] = {}
    for name in _in_order(_chosen(packages, form.closure), packages):
        package = packages[name]
        references = {
            made[other] for other in package.references if other in made
        }  # except a reference that closes a cycle
        made[name] = builder.add(builder.output_path(package.name), package.tree, references=references).path
    builder.add(builder.output_path("closure"), b"", references=made.values())
    files = [file for package in packages.values() for file in package.files if not os.path.islink(file)]
    small = [file for file in files if os.path.getsize(file) <= _SMALL]
    builder.add(builder.output_path("many-small-files"), _many(small, form.many))
    large = root / "large"
    _concatenate(files, large, form.large)
    builder.add(builder.output_path("large-file"), large)
    large.unlink()


def _debian_packages() -> dict[str, Package]:
    command = ["dpkg-query", "--show", "--showformat", r"${Package}\t${Version}\t${Depends}\n${db-fsys:Files}\n"]
    packages: dict[str, Package] = {}
    files: dict[str, None] = {}
    for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines():
        if line.startswith(" "):
            directory, name = os.path.split(line[1:])
            file = os.path.join(os.path.realpath(directory), name)  # /bin is a symlink
            if _is_readable(file):
                files[file] = None
        elif line:
            name, version, depends = line.split("\t")
            needed = [re.split("[ :(]", dependency)[0] for dependency in re.split(", | [|] ", depends)]
            files = {}
            packages[name] = Package(re.sub("[^0-9A-Za-z+._?=-]", "_", f"{name}-{version}"), files, needed)
    return {name: package for name, package in packages.items() if package.files}


def _nix_packages() -> dict[str, Package]:
    store = Store(_STORE_DIR, _STORE_DIR, "/nix/var/nix/db/db.sqlite")
    packages: dict[str, Package] = {}
    for path in store.valid_paths()[0]:
        info = store.path_info(StorePath.in_dir(_STORE_DIR, path).hash_part)
        if info is not None:
            entries = [os.path.join(top, name) for top, _, names in os.walk(path) for name in names] or [path]
            packages[str(info.path)] = Package(info.path.name, list(filter(_is_readable, entries)), info.references)
    return packages


def _is_readable(path: str) -> bool:
    """Return True if the path can be part of a package: a symlink, or a readable file."""
    return os.path.islink(path) or (os.path.isfile(path) and os.access(path, os.R_OK))


def _chosen(packages: Mapping[str, Package], size: int) -> Iterator[str]:
    """Yield the smallest packages, up to that total size."""
    for name in sorted(packages, key=lambda name: (packages[name].size, name)):
        size -= packages[name].size
        if size < 0:
            return
        yield name


def _in_order(names: Iterable[str], packages: Mapping[str, Package]) -> Iterator[str]:
    """Yield each package after its dependencies, except in cycles."""
    seen: set[str] = set()
    wanted = set(names)

    def visit(name: str) -> Iterator[str]:
        if name in wanted and name not in seen:
            seen.add(name)
            for other in packages[name].references:
                yield from visit(other)
            yield name

    for name in sorted(wanted):
        yield from visit(name)


def _many(files: Sequence[str], count: int) -> Tree:
    """Return a tree of that many files, fifty per directory. Repeats files if there are too few."""
    tree: dict[str, dict[str, Tree]] = {}
    for number, file in enumerate(islice(cycle(files), count)):
        tree.setdefault(f"{number // 50:05}", {})[f"{number:06}-{os.path.basename(file)}"] = Path(file)
    return tree


def _concatenate(files: Sequence[str], target: Path, size: int) -> None:
    """Write one file of that size, with the content of the files."""
    with target.open("wb") as out:
        for file in cycle(files):
            with open(file, "rb") as content:
                while data := content.read(min(MIB, size - out.tell())):
                    out.write(data)
            if out.tell() == size:
                return

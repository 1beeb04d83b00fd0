"""Builder of small but real Nix stores without Nix: files as Nix leaves them, and the rows that make them valid.

Every path is genuine: computed from its content or its derivation. `nix-store --verify` accepts the store.
"""

import bz2
import hashlib
import os
import platform
import sqlite3
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cache
from tempfile import TemporaryDirectory

from harmonia.nix import base32
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey
from harmonia.nix.store_path import StorePath
from harmonia.tools.fixture_tree import Tree, remove_tree, write_tree

# Nix `src/libstore/schema.sql`, version 10: unchanged since Nix 2.3.
_SCHEMA = """
create table ValidPaths (
    id               integer primary key autoincrement not null,
    path             text unique not null,
    hash             text not null,
    registrationTime integer not null,
    deriver          text,
    narSize          integer,
    ultimate         integer,
    sigs             text,
    ca               text
);
create table Refs (
    referrer  integer not null,
    reference integer not null,
    primary key (referrer, reference),
    foreign key (referrer) references ValidPaths(id) on delete cascade,
    foreign key (reference) references ValidPaths(id) on delete restrict
);
create index IndexReferrer on Refs(referrer);
create index IndexReference on Refs(reference);
create trigger DeleteSelfRefs before delete on ValidPaths
  begin
    delete from Refs where referrer = old.id and reference = old.id;
  end;
create table DerivationOutputs (
    drv  integer not null,
    id   text not null,
    path text not null,
    primary key (drv, id),
    foreign key (drv) references ValidPaths(id) on delete cascade
);
create index IndexDerivationOutputs on DerivationOutputs(path);
"""

_ATERM_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n", "\r": r"\r", "\t": r"\t"})


@cache
def _empty_database() -> bytes:
    """Return the database of an empty store. To create it takes SQLite longer than to write a copy."""
    with TemporaryDirectory() as directory:
        file = os.path.join(directory, "db.sqlite")
        with closing(sqlite3.connect(file)) as connection:
            connection.execute("pragma journal_mode = wal")
            connection.executescript(_SCHEMA)
        with open(file, "rb") as made:
            return made.read()


class StoreBuilder:
    """Store in `root`/nix, with the layout of a chroot store of Nix. Its paths begin with `store_dir`.

    Creates an empty store if there is none. Closes the database after each call. Between calls the database is as
    Nix up to 2.21 leaves it: without -wal and -shm files, unless another process has it open.
    """

    def __init__(self, root: str | os.PathLike[str], store_dir: str = "/nix/store") -> None:
        self.store_dir = store_dir
        self.real_dir = os.path.join(root, "nix/store")
        self.db_path = os.path.join(root, "nix/var/nix/db/db.sqlite")
        self.log_dir = os.path.join(root, "nix/var/log/nix/drvs")
        if not os.path.exists(self.db_path):
            for directory in (self.real_dir, os.path.dirname(self.db_path), self.log_dir):
                os.makedirs(directory, exist_ok=True)
            with open(self.db_path, "wb") as file:
                file.write(_empty_database())
            with open(os.path.join(os.path.dirname(self.db_path), "schema"), "w", encoding="ascii") as file:
                file.write("10")

    @contextmanager
    def connect(self) -> Iterator[sqlite3.Connection]:
        """Open the database with Nix's pragmas, for one transaction."""
        with closing(sqlite3.connect(self.db_path)) as connection, connection:
            connection.execute("pragma foreign_keys = on")
            connection.execute("pragma synchronous = normal")
            yield connection

    def real_path(self, path: StorePath) -> bytes:
        """Return the location of the store object on disk."""
        return os.fsencode(f"{self.real_dir}/{path}")

    def output_path(self, name: str, derivation_hash: bytes = b"") -> StorePath:
        """Return the path of the output `out` of a derivation. Without a hash, the path depends on the name only."""
        return self._path("output:out", derivation_hash or hashlib.sha256(name.encode()).digest(), name)

    def add(
        self,
        path: StorePath,
        tree: Tree,
        *,
        references: Iterable[StorePath] = (),
        deriver: StorePath | None = None,
        keys: Iterable[SecretKey] = (),
        sigs: Iterable[str] = (),
        ca: str | None = None,
        known_size: bool = True,
    ) -> PathInfo:
        """Add `tree` as `path`, with the signatures `sigs` and those of `keys`. None of the arguments is checked.

        Without `known_size`, the size in the database is NULL, as for paths of very old versions of Nix.
        """
        nar_hash, nar_size = write_tree(tree, self.real_path(path))
        info = PathInfo(path, nar_hash, nar_size, tuple(sorted(references)), deriver, tuple(sigs), ca)
        fingerprint = info.fingerprint(self.store_dir)
        info = replace(info, sigs=(*info.sigs, *(key.sign(fingerprint) for key in keys)))
        self._register(info, known_size=known_size)
        return info

    def add_source(self, name: str, tree: Tree, references: Collection[StorePath] = ()) -> PathInfo:
        """Add `tree` under the path computed from its NAR, as `nix-store --add` does."""
        staged = os.fsencode(f"{self.real_dir}/.{name}")
        nar_hash, nar_size = write_tree(tree, staged)
        path = self._path("source", nar_hash, name, references)
        os.rename(staged, self.real_path(path))
        ca = f"fixed:r:sha256:{base32.encode(nar_hash)}"
        info = PathInfo(path, nar_hash, nar_size, tuple(sorted(references)), ca=ca)
        self._register(info)
        return info

    def add_text(self, name: str, text: bytes, references: Collection[StorePath] = ()) -> PathInfo:
        """Add a file under the path computed from its contents, as `builtins.toFile` does."""
        digest = hashlib.sha256(text).digest()
        path = self._path("text", digest, name, references)
        return self.add(path, text, references=references, ca=f"text:sha256:{base32.encode(digest)}")

    def add_derivation(
        self,
        name: str,
        builder: str,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        sources: Sequence[StorePath] = (),
    ) -> tuple[PathInfo, StorePath]:
        """Add a derivation with the output `out` and the inputs `sources`. Return it and the path of its output.

        Does not add the output. The output path is computed from the derivation with an empty output path (Nix
        `src/libstore/derivations.cc`).
        """
        system = f"{platform.machine()}-linux"
        inputs = [f"{self.store_dir}/{source}" for source in sorted(sources)]

        def string(text: str) -> str:
            return f'"{text.translate(_ATERM_ESCAPES)}"'

        def derivation(out: str) -> bytes:
            variables = {**(environment or {}), "builder": builder, "name": name, "out": out, "system": system}
            fields = (
                f'[({string("out")},{string(out)},"","")]',
                "[]",
                f"[{','.join(map(string, inputs))}]",
                string(system),
                string(builder),
                f"[{','.join(map(string, arguments))}]",
                f"[{','.join(f'({string(key)},{string(value)})' for key, value in sorted(variables.items()))}]",
            )
            return f"Derive({','.join(fields)})".encode()

        output = self.output_path(name, hashlib.sha256(derivation("")).digest())
        out = f"{self.store_dir}/{output}"
        info = self.add_text(f"{name}.drv", derivation(out), sources)
        with self.connect() as connection:
            row = connection.execute("select id from ValidPaths where path = ?", (f"{self.store_dir}/{info.path}",))
            connection.execute("insert into DerivationOutputs values (?, 'out', ?)", (*row.fetchone(), out))
        return info, output

    def add_log(self, derivation: StorePath, log: bytes, *, compressed: bool = True) -> str:
        """Add the build log of a derivation. Return the path of the log file."""
        directory = os.path.join(self.log_dir, derivation[:2])
        os.makedirs(directory, exist_ok=True)
        path = os.path.join(directory, derivation[2:] + (".bz2" if compressed else ""))
        with open(path, "wb") as file:
            file.write(bz2.compress(log) if compressed else log)
        return path

    def delete(self, path: StorePath) -> None:
        """Delete a path without referrers, in the order of Nix's garbage collector: the row, then the files."""
        with self.connect() as connection:
            connection.execute("delete from ValidPaths where path = ?", (f"{self.store_dir}/{path}",))
        remove_tree(self.real_path(path))

    def _path(self, kind: str, digest: bytes, name: str, references: Collection[StorePath] = ()) -> StorePath:
        """Return the path computed from a digest (Nix `src/libstore/store-dir-config.cc`, `makeStorePath`)."""
        kind = ":".join((kind, *(f"{self.store_dir}/{reference}" for reference in sorted(references))))
        whole = hashlib.sha256(f"{kind}:sha256:{digest.hex()}:{self.store_dir}:{name}".encode()).digest()
        folded = bytearray(20)
        for index, byte in enumerate(whole):
            folded[index % 20] ^= byte
        return StorePath(f"{base32.encode(bytes(folded))}-{name}")

    def _register(self, info: PathInfo, *, known_size: bool = True) -> None:
        row = (
            f"{self.store_dir}/{info.path}",
            f"sha256:{info.nar_hash.hex()}",
            int(time.time()),
            f"{self.store_dir}/{info.deriver}" if info.deriver else None,
            info.nar_size if known_size else None,
            " ".join(info.sigs) or None,
            info.ca,
        )
        with self.connect() as connection:
            referrer = connection.execute(
                "insert into ValidPaths (path, hash, registrationTime, deriver, narSize, sigs, ca)"
                " values (?, ?, ?, ?, ?, ?, ?)",
                row,
            ).lastrowid
            # A reference to a path that is not valid is NULL, which the table rejects.
            connection.executemany(
                "insert into Refs values (?, (select id from ValidPaths where path = ?))",
                ((referrer, f"{self.store_dir}/{reference}") for reference in info.references),
            )

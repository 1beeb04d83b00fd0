"""Tables and rows of a store with content-addressed derivations."""

from harmonia.nix.store_path import StorePath
from harmonia.tools.store_builder import StoreBuilder

# Nix 2.34 `src/libstore/ca-specific-schema.sql`, without its indices.
REALISATIONS = """
create table Realisations (
    id integer primary key autoincrement not null,
    drvPath text not null,
    outputName text not null,
    outputPath integer not null,
    signatures text,
    foreign key (outputPath) references ValidPaths(id) on delete cascade
);
create table RealisationsRefs (
    referrer integer not null,
    realisationReference integer,
    foreign key (referrer) references Realisations(id) on delete cascade,
    foreign key (realisationReference) references Realisations(id) on delete restrict
);
"""
BUILD_TRACE = """
create table BuildTraceV3 (
    id integer primary key autoincrement not null,
    drvPath text not null,
    outputName text not null,
    outputPath text not null,
    signatures text
);
"""


def register(store: StoreBuilder, derivation: str, output: str, path: StorePath, sigs: str = "") -> None:
    with store.connect() as connection:
        connection.execute(
            "insert into Realisations (drvPath, outputName, outputPath, signatures)"
            " select ?, ?, id, ? from ValidPaths where path = ?",
            (derivation, output, sigs, f"{store.store_dir}/{path}"),
        )


def trace(store: StoreBuilder, derivation: str, output: str, path: StorePath, sigs: str = "") -> None:
    with store.connect() as connection:
        connection.execute(
            "insert into BuildTraceV3 (drvPath, outputName, outputPath, signatures) values (?, ?, ?, ?)",
            (derivation, output, f"{store.store_dir}/{path}", sigs),
        )


def create(store: StoreBuilder, tables: str) -> None:
    with store.connect() as connection:
        connection.executescript(tables)


HASH, OTHER = f"sha256:{'a' * 64}", f"sha256:{'b' * 64}"

"""A realistic closure in a real store, which a server serves and clients fetch."""

from dataclasses import dataclass
from pathlib import Path

from support.nix_client import Client, Key

_NAME_AT = len("/nix/store/") + 32 + len("-")


@dataclass(frozen=True)
class Closure:
    """The paths that closure.nix builds, and two content-addressed paths, in the store of `server`.

    `paths` maps the name of a store path to the path. Nothing is signed; `key` is for signing. Tests share the
    closure, and must not change it.
    """

    server: Client
    paths: dict[str, str]
    key: Key

    @property
    def top(self) -> str:
        """Return the path that refers, directly or indirectly, to everything except the content-addressed paths."""
        return self.paths["top-1.0"]


def make_closure(server: Client) -> Closure:
    built = server.build(Path(__file__).with_name("closure.nix").read_text())
    recursive = server.directory / "added-1.0"
    recursive.mkdir()
    (recursive / "file").write_text("added with nix-store --add\n")
    flat = server.directory / "flat-1.0"
    flat.write_text("added with nix-store --add-fixed\n")
    added = (
        *server.run("nix-store", "--add", recursive).lines,
        *server.run("nix-store", "--add-fixed", "sha256", flat).lines,
    )
    paths = {path[_NAME_AT:]: path for path in (*built, *added)}
    return Closure(server, paths, server.generate_key("closure-1"))


def build_one(server: Client, name: str, script: str, *, timeout: float = 120) -> str:
    """Build one store path without references, by a shell script that creates $out."""
    (path,) = server.build(_derivation(name, script), timeout=timeout)
    return path


def instantiate(server: Client, name: str, script: str) -> str:
    """Return the .drv of a path like those of `build_one`, without building it."""
    expression = server.directory / f"{name}.nix"
    expression.write_text(_derivation(name, script))
    return server.run("nix-instantiate", expression).text


def _derivation(name: str, script: str) -> str:
    return f"""
        derivation {{
          name = "{name}";
          system = builtins.currentSystem;
          builder = "/bin/sh";
          args = [ "-euc" "{script}" ];
          PATH = "/usr/bin:/bin";
        }}
        """


def make_sparse(server: Client) -> str:
    """Build a store path with a sparse file of 5 GiB, which takes no disk space, but all the time to read its zeros."""
    return build_one(server, "sparse-1.0", "mkdir $out; truncate --size 5G $out/zeros", timeout=600)


def requisites(client: Client, path: str) -> list[str]:
    return client.run("nix-store", "--query", "--requisites", path).lines

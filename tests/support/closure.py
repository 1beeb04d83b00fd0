"""A realistic closure in a real store, for a server to serve and clients to fetch."""

from dataclasses import dataclass
from pathlib import Path

from support.nix_client import Client, Key

_NAME_AT = len("/nix/store/") + 32 + len("-")


@dataclass(frozen=True)
class Closure:
    """What closure.nix built, and two paths added by their content, in the store of `server`.

    `paths` maps a store path's name to the path. Nothing is signed; `key` is there to sign with. Tests share it:
    read only.
    """

    server: Client
    paths: dict[str, str]
    key: Key

    @property
    def top(self) -> str:
        """Refers, directly or not, to everything but the content-addressed paths."""
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
    """Really build one store path, by a shell script that makes $out. It refers to nothing."""
    (path,) = server.build(_derivation(name, script), timeout=timeout)
    return path


def instantiate(server: Client, name: str, script: str) -> str:
    """The same to be built: its .drv."""
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
    """A store path with a file of 5 GiB that takes no room on disk, but all the time that reading zeros takes."""
    return build_one(server, "sparse-1.0", "mkdir $out; truncate --size 5G $out/zeros", timeout=600)


def requisites(client: Client, path: str) -> list[str]:
    return client.run("nix-store", "--query", "--requisites", path).lines

"""Imports point one way: cli → {supervisor, warm} → server → upstream → {store, nar_cache} → settings → nix."""

import ast
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "harmonia"
LAYERS = {
    "errors": 0,
    "__version__": 0,
    "nix": 1,
    "access": 1,
    "systemd": 1,
    "cached_file": 2,
    "kinds": 2,
    "tree": 2,
    "settings": 3,
    "credentials": 4,
    "store": 4,
    "store_builder": 4,
    "metrics": 4,
    "nar_cache": 4,
    "index_file": 4,
    "zstd": 4,
    "client": 4,
    "sockets": 4,
    "compression": 6,
    "config": 6,
    "server": 7,
    "supervisor": 8,
    "warm": 8,
    "cli": 9,
    "__main__": 10,
}
OTHER = 5  # any other module: it builds on the store and the like, none of them on it


def imports(source: str, package: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def violations(source: str, module: str) -> list[str]:
    """What a module such as `harmonia.nix.nar` must not import, of what it does import."""
    room = module.split(".")[1]

    def forbidden(imported: str) -> bool:
        top, _, rest = imported.partition(".")
        if top == "harmonia":
            other = rest.partition(".")[0]
            return other != room and LAYERS.get(other, OTHER) >= LAYERS.get(room, OTHER)
        return (top == "sanic" and room != "server") or (top == "asyncio" and room == "nix")

    return [imported for imported in imports(source, module.rpartition(".")[0]) if forbidden(imported)]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    module = ".".join(("harmonia", *path.relative_to(PACKAGE).with_suffix("").parts))
    assert not violations(path.read_text(), module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("nix.nar", "import asyncio"),
        ("nix.nar", "def f():\n    from asyncio import sleep"),
        ("nix.nar", "import harmonia.store"),
        ("nix.nar", "from harmonia import settings"),
        ("nix.nar", "from harmonia import systemd as s"),
        ("nix.nar", "from ..settings import Settings"),
        ("nix.nar", "from harmonia.yet_unwritten import f"),
        ("errors", "from harmonia.nix import nar"),
        ("systemd", "from harmonia.nix import nar"),
        ("settings", "from harmonia.store import Store"),
        ("store", "from .upstream import f"),
        ("store", "import harmonia.yet_unwritten"),
        ("store", "import os, sanic.response"),
        ("yet_unwritten", "from harmonia.server.app import create_app"),
        ("supervisor", "from sanic import Sanic"),
        ("server.app", "import harmonia.cli"),
        ("server.app", "import harmonia.supervisor"),
    ],
)
def test_what_points_another_way_is_found(module: str, source: str) -> None:
    assert violations(source, f"harmonia.{module}")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("nix.nar", "import os\nfrom harmonia.errors import FormatError\nfrom . import base32"),
        ("settings", "from harmonia.nix.signing import SecretKey"),
        ("yet_unwritten", "import asyncio\nfrom harmonia import __version__, settings, store, systemd"),
        ("server.app", "import sanic\nfrom harmonia.yet_unwritten import f"),
        ("__main__", "from harmonia.cli import main"),
    ],
)
def test_what_points_the_right_way_is_not(module: str, source: str) -> None:
    assert not violations(source, f"harmonia.{module}")

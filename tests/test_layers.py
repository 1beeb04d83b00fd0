"""Imports between the packages of `harmonia` point one way, and those between its modules never in a circle."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "harmonia"
ORDER = (
    "cli > tools > server > mirror > upload > push upstream > cache > process > store > config > nix"
    " > metrics errors ownership untrusted"
)
"""Each unit imports only from itself and from units to the right. Units between two `>` do not import each other."""
SERVER_ORDER = (
    "worker > app cache_warmer mirror_writer > routes error_response > resources > page connections > context"
    " > events served_paths > made_once path_lookup store_events > absent_paths > http"
)


def layers(order: str) -> dict[str, int]:
    return {unit: depth for depth, level in enumerate(order.split(" > ")) for unit in level.split()}


LAYERS = {
    "harmonia": layers(ORDER) | {"__main__": -1, "__version__": 99, "__init__": 99},
    "harmonia.server": layers(SERVER_ORDER) | {"__init__": 99},
}


def imports(source: str, package: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def violations(source: str, module: str) -> list[str]:
    """Return the imports of a module such as `harmonia.nix.nar` that point against the order."""
    unit = module.split(".")[1]

    def points_back(package: str, imported: str) -> bool:
        if not (module.startswith(f"{package}.") and imported.startswith(f"{package}.")):
            return False
        own, other = (name.removeprefix(f"{package}.").partition(".")[0] for name in (module, imported))
        return other != own and LAYERS[package][other] <= LAYERS[package][own]

    def forbidden(imported: str) -> bool:
        top = imported.partition(".")[0]
        foreign = (top == "sanic" and unit != "server") or (top == "asyncio" and unit == "nix")
        return foreign or any(points_back(package, imported) for package in LAYERS)

    return [imported for imported in imports(source, module.rpartition(".")[0]) if forbidden(imported)]


def test_imports_point_one_way() -> None:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(("harmonia", *path.relative_to(PACKAGE).with_suffix("").parts))
        found[module] = violations(path.read_text(), module)
    assert len(found) > 100
    assert not {module: imported for module, imported in found.items() if imported}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_module_imports_itself_through_others() -> None:
    modules = {module_of(path): path for path in PACKAGE.rglob("*.py")}

    def imported_modules(module: str, path: Path) -> set[str]:
        package = module if path.stem == "__init__" else module.rpartition(".")[0]
        names = imports(path.read_text(), package)
        found = {name if name in modules else name.rpartition(".")[0] for name in names}
        return (found & modules.keys()) - {module}

    graph = {module: imported_modules(module, path) for module, path in modules.items()}
    assert graph["harmonia.server.app"] > {"harmonia.server.context", "harmonia.server.http.auth"}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names a cycle


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("nix.nar", "import asyncio"),
        ("nix.nar", "def f():\n    from asyncio import sleep"),
        ("nix.nar", "import harmonia.store"),
        ("nix.nar", "from harmonia import config"),
        ("nix.nar", "from harmonia import process as p"),
        ("nix.nar", "from ..config.settings import Settings"),
        ("errors", "from harmonia.nix import nar"),
        ("metrics.prometheus", "from harmonia.errors import HarmoniaError"),
        ("config.settings", "from harmonia.store.store import Store"),
        ("store.store", "from ..upstream import f"),
        ("store.store", "import os, sanic.response"),
        ("process.sockets", "from harmonia.cache import disk_cache"),
        ("upstream.client", "from harmonia.server.app import create_app"),
        ("process.supervisor", "from sanic import Sanic"),
        ("tools.demo", "from sanic import Sanic"),
        ("server.app", "import harmonia.cli"),
        ("server.app", "import harmonia.tools.demo"),
        ("server.http.auth", "from harmonia.server.context import ServerContext"),
        ("server.context", "from harmonia.server.resources import narinfo"),
    ],
)
def test_import_against_the_order_is_found(module: str, source: str) -> None:
    assert violations(source, f"harmonia.{module}")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("nix.nar", "import os\nfrom harmonia.errors import FormatError\nfrom . import base32"),
        ("config.settings", "from harmonia.nix.signing import SecretKey"),
        ("upstream.client", "import asyncio\nfrom harmonia import __version__, config, process, store"),
        (
            "server.app",
            "import sanic\nfrom harmonia.upstream import client\nfrom .error_response import response",
        ),
        ("__main__", "from harmonia.cli import main"),
    ],
)
def test_import_along_the_order_is_allowed(module: str, source: str) -> None:
    assert not violations(source, f"harmonia.{module}")

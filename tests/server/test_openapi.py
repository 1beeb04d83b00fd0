"""docs/openapi.json documents every resource, and the server conforms to it."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from harmonia.server.routes import METRICS_ROUTES, PUSH_ROUTES, ROUTES
from harmonia.tools.store_builder import StoreBuilder
from support.build_logs import add_log
from support.realisations import BUILD_TRACE, HASH, REALISATIONS, create, register, trace
from support.running import PATIENCE_S, Server
from support.shared_store import BIG

DOCUMENT = Path(__file__).parents[2] / "docs" / "openapi.json"
EXAMPLE = "6jg9f0rfvvdnpi5hyvjxgjlx7ps3l1m4"


def pattern(uri: str) -> str:
    """Return the regular expression that Sanic makes of a route."""
    kinds = {"str": "[^/]+", "path": ".+"}
    return re.sub(r"<\w+:(.*?)>(?=/|$)", lambda parameter: kinds.get(parameter[1], parameter[1]), uri)


def examples(path: str, item: dict[str, Any], parameters: dict[str, Any]) -> str:
    """Return the path with an example for each parameter."""
    for given in item.get("parameters", ()):
        parameter = parameters[given["$ref"].rpartition("/")[2]] if "$ref" in given else given
        example = (
            parameter.get("example") or next(iter(parameter.get("examples", {"": {"value": ""}}).values()))["value"]
        )
        path = path.replace(f"{{{parameter['name']}}}", example)
    return path


def test_document_has_exactly_the_routes_of_the_server() -> None:
    document = json.loads(DOCUMENT.read_text())
    paths = [examples(path, item, document["components"]["parameters"]) for path, item in document["paths"].items()]
    routes = ROUTES + METRICS_ROUTES + PUSH_ROUTES
    uris = [route.uri for route in routes]
    matches = [[uri for uri in uris if re.fullmatch(pattern(uri), path)] for path in paths]
    assert all(len(uris) == 1 for uris in matches)
    assert sorted(uri for found in matches for uri in found) == sorted(uris)
    methods = {route.uri: {method.lower() for method in route.methods} for route in routes}
    put = {route.uri for route in routes if route.put is not None}
    for [uri], item in zip(matches, document["paths"].values(), strict=True):
        assert methods[uri] | ({"put"} if uri in put else set()) == item.keys() - {"parameters"}


@pytest.mark.skipif(find_spec("schemathesis") is None, reason="no schemathesis here: pip install schemathesis")
@pytest.mark.slow
@pytest.mark.parametrize("phases", ["examples,fuzzing", "coverage"])
def test_schemathesis_finds_no_response_that_violates_the_document(
    start: Callable[..., Server], store: StoreBuilder, tmp_path: Path, phases: str
) -> None:
    """It makes valid and invalid requests from the document, including methods that do not exist."""
    info = store.add(store.output_path("tree"), {"big": BIG, "directory": {"file": b"text"}})
    add_log(store, f"{info.path}.drv")
    create(store, REALISATIONS + BUILD_TRACE)
    register(store, HASH, "out", info.path)
    trace(store, f"{info.path}.drv", "out", info.path)
    server = start(store=tmp_path / "store", settings="browse = true")
    (tmp_path / "openapi.json").write_text(DOCUMENT.read_text().replace(EXAMPLE, info.path.hash_part))
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance"
    checks += ",response_schema_conformance,unsupported_method"
    command = [sys.executable, "-m", "schemathesis.cli", "run", "openapi.json", "--url", server.url]
    command += ["--exclude-path-regex", "^/(push/|events$)", "--phases", phases]
    command += ["--generation-deterministic", "--max-examples", "3"]
    command += ["--checks", checks, "--no-color"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert server.get("/health").status == 200
    assert not [line for line in server.log if "Traceback" in line]

"""`/diff/…` and `/sbom/…` describe closures, from the database alone."""

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harmonia.nix.path_info import PathInfo
from harmonia.tools.store_builder import StoreBuilder
from support.running import Server

Start = Callable[..., Server]


@pytest.fixture
def closures(store: StoreBuilder) -> tuple[PathInfo, PathInfo]:
    """Build two closures: `zlib` gets another version, `old` is removed, `new` is added, `same` stays."""

    def add(name: str, *references: PathInfo, size: int = 10) -> PathInfo:
        return store.add(store.output_path(name), bytes(size), references=[each.path for each in references])

    same = add("same-1.0")
    before = add("system-1", same, add("zlib-1.2"), add("old"))
    after = add("system-2", same, add("zlib-1.3", size=1000), add("zlib-1.3-dev"), add("new-2"))
    return before, after


def diff(server: Server, before: PathInfo, after: PathInfo) -> dict[str, Any]:
    answer = server.get(f"/diff/{before.path.hash_part}/{after.path.hash_part}?json")
    assert answer.status == 200
    value: dict[str, Any] = json.loads(answer.text)
    return value


def test_changed_added_and_removed_packages_are_named(
    start: Start, tmp_path: Path, closures: tuple[PathInfo, PathInfo]
) -> None:
    before, after = closures
    server = start(store=tmp_path / "store", settings="browse = true")
    value = diff(server, before, after)
    changes = {change["name"]: (change["before"], change["after"]) for change in value["changes"]}
    assert changes == {
        "new": ([], ["2"]),
        "old": ([""], []),
        "system": (["1"], ["2"]),
        "zlib": (["1.2"], ["1.3"]),
    }
    [size] = [change["size"] for change in value["changes"] if change["name"] == "zlib"]
    assert size > 990
    assert diff(server, after, before)["changes"][0] == {"name": "new", "before": ["2"], "after": [], "size": -128}
    assert diff(server, before, before)["changes"] == []
    page = server.get(f"/diff/{before.path.hash_part}/{after.path.hash_part}").text
    assert "1 added, 1 removed, 2 changed" in page
    assert "<td>zlib<td>1.2<td>1.3" in page


def test_page_of_a_path_leads_to_comparisons_with_other_versions(
    start: Start, tmp_path: Path, closures: tuple[PathInfo, PathInfo]
) -> None:
    before, after = closures
    server = start(store=tmp_path / "store", settings="browse = true")
    page = server.get(f"/path/{before.path.hash_part}").text
    assert f"../sbom/{before.path.hash_part}" in page
    [search] = re.findall(r'href="\.\.(/search[^"]*)"', page)
    found = server.get(html.unescape(search)).text
    assert f'href="diff/{before.path.hash_part}/{after.path.hash_part}"' in found
    unknown = server.get(f"/search?q=system&compare={'0' * 32}").text
    assert f'href="path/{after.path.hash_part}"' in unknown


def test_bill_of_materials_has_each_path_and_its_references(
    start: Start, tmp_path: Path, closures: tuple[PathInfo, PathInfo]
) -> None:
    _, after = closures
    server = start(store=tmp_path / "store", settings="browse = true")
    answer = server.get(f"/sbom/{after.path.hash_part}")
    assert answer.headers["content-type"] == "application/vnd.cyclonedx+json; version=1.6"
    value = json.loads(answer.text)
    components = [value["metadata"]["component"], *value["components"]]
    named = {component["name"]: component.get("version") for component in components}
    assert named == {"system": "2", "same": "1.0", "zlib": "1.3", "new": "2"}
    references = {each["ref"]: each["dependsOn"] for each in value["dependencies"]}
    assert references.keys() == {component["bom-ref"] for component in components}
    assert len(references) == len(components) == 5
    assert len(references[f"/nix/store/{after.path}"]) == 4
    assert server.get(f"/sbom/{after.path.hash_part}").body == answer.body


def test_unpublished_paths_are_left_out(start: Start, tmp_path: Path, closures: tuple[PathInfo, PathInfo]) -> None:
    before, after = closures
    server = start(store=tmp_path / "store", settings='browse = true\n[publish]\ndeny = ["zlib*", "old"]')
    assert [change["name"] for change in diff(server, before, after)["changes"]] == ["new", "system"]
    assert "zlib" not in server.get(f"/sbom/{after.path.hash_part}").text


def test_nothing_is_shown_without_browse(start: Start, tmp_path: Path, closures: tuple[PathInfo, PathInfo]) -> None:
    before, after = closures
    server = start(store=tmp_path / "store")
    assert server.get(f"/sbom/{before.path.hash_part}").status == 404
    assert server.get(f"/diff/{before.path.hash_part}/{after.path.hash_part}").status == 404

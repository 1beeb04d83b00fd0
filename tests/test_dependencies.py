"""Imported packages are declared, and pyproject.toml, package.nix and nixpkgs-versions.txt agree."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUNTIME = {each.name: each for each in map(Requirement, PROJECT["dependencies"])}
EXTRAS = {
    extra: {each.name: each for each in map(Requirement, PROJECT["optional-dependencies"][extra])}
    for extra in ("lan", "s3")
}
OPTIONAL = EXTRAS["lan"] | EXTRAS["s3"]
DEV = {each.name: each for each in map(Requirement, PROJECT["optional-dependencies"]["dev"]) if each.name != "harmonia"}
PACKAGE = (ROOT / "package.nix").read_text()


def imported(folder: Path) -> Iterator[str]:
    """Yield the distributions that the modules in a folder import."""
    distributions = packages_distributions()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Import(names):
                    modules = [name.name for name in names]
                case ast.ImportFrom(module=str(module)):
                    modules = [module]
                case _:
                    continue
            for top in {module.partition(".")[0] for module in modules} - {"harmonia", *sys.stdlib_module_names}:
                yield canonicalize_name(distributions[top][0])


def test_every_import_is_declared() -> None:
    assert set(imported(ROOT / "harmonia")) == set(RUNTIME) | set(OPTIONAL)


def test_nix_package_has_the_same_dependencies() -> None:
    listed = re.search(r"\n +dependencies = \[(.*?)\]", PACKAGE, re.DOTALL)
    assert listed
    assert [name.removeprefix("python3Packages.") for name in listed[1].split()] == sorted(RUNTIME)
    for extra, packages in EXTRAS.items():
        optional = re.search(rf"optional-dependencies\.{extra} = \[(.*?)\];", PACKAGE, re.DOTALL)
        assert optional
        assert optional[1].split() == [f"python3Packages.{name}" for name in sorted(packages)]


def test_sanic_has_an_upper_bound() -> None:
    assert "<26" in str(RUNTIME["sanic"].specifier)


@pytest.mark.parametrize("requirement", [*RUNTIME.values(), *OPTIONAL.values(), *DEV.values()], ids=str)
def test_version_in_nixpkgs_satisfies_the_requirement(requirement: Requirement) -> None:
    lines = (ROOT / ".ci/nixpkgs-versions.txt").read_text().splitlines()
    versions = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert requirement.specifier.contains(versions[requirement.name])


def test_tests_of_other_versions_exist() -> None:
    script = (ROOT / ".ci/test-versions").read_text()
    named = re.findall(r"(tests/[\w/]+\.py)(?:::test_\{([\w,]+)\})?", script)
    assert any(tests for _, tests in named)
    for file, tests in named:
        text = (ROOT / file).read_text()
        assert all(f"def test_{test}(" in text for test in filter(None, tests.split(",")))

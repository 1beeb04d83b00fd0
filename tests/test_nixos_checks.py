"""`nix build` runs no tests, and `nix flake check` is as strict as `make check`."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.nixos_machine import build, evaluate, needs_nix
from support.pages import ROOT

pytestmark = [pytest.mark.nix, needs_nix]


def flake(project: Path = ROOT, packages: str = "") -> str:
    """Return a Nix binding of the name `flake`: our flake for the files of a project.

    Its nixpkgs is the small one of the lab, with changed packages.
    """
    return f"""
      flake =
        let
          nixpkgs = (import {ROOT}/nixos-tests/eval/flake.nix).outputs {{ self = nixpkgs; }};
          changed = nixpkgs.legacyPackages // {{
            x86_64-linux = nixpkgs.legacyPackages.x86_64-linux // {{ {packages} }};
          }};
        in
        (import {ROOT}/flake.nix).outputs {{
          self = flake // {{ outPath = "{project}"; }};
          nixpkgs = nixpkgs // {{ legacyPackages = changed; }};
        }};
    """


def attributes(package: str) -> Any:
    """Return how the builder of nixpkgs is called for a package of the flake."""
    return evaluate(f"""
      let {flake()} args = {package}.args; in
      {{
        # The builder runs the tests unless this is false.
        tested = args.doCheck or true;
        inputs = map (each: each.pname) (args.nativeCheckInputs or [ ]);
        flags = args.pytestFlags or [ ];
      }}
    """)


@pytest.mark.parametrize("package", ["packages.x86_64-linux.default", "checks.x86_64-linux.package"])
def test_build_of_the_package_runs_no_tests(package: str) -> None:
    assert attributes(f"flake.{package}") == {"tested": False, "inputs": [], "flags": []}


@pytest.mark.parametrize("package", ["packages.x86_64-linux.default.tests.pytest", "checks.x86_64-linux.pytest"])
def test_passthru_test_and_flake_check_run_the_tests_in_parallel(package: str) -> None:
    found = attributes(f"flake.{package}")
    assert found["tested"]
    assert {"pytest", "pytest-xdist", "pytestCheckHook"} <= set(found["inputs"])
    assert "--dist=worksteal" in found["flags"]


TOOLS = Path(sys.prefix)
"""The environment with ruff, shellcheck, shfmt, treefmt and mypy, which `make check` uses."""


class TestOneSetOfRules:
    """`make check` and the check `lints` of the flake judge a small project alike, both with the same programs."""

    @pytest.fixture
    def project(self, tmp_path: Path) -> Path:
        project = tmp_path / "project"
        for module in (
            "benchmarks/measure.py",
            "harmonia/__init__.py",
            "tests/test_it.py",
            "nixos-tests/lab/machine.py",
        ):
            (project / module).parent.mkdir(parents=True)
            (project / module).write_text('"""A module."""\n')
        (project / "good.sh").write_text("#!/bin/sh\nif true; then\n  echo good\nfi\n")
        for name in ("Makefile", "pyproject.toml", "treefmt.toml"):
            shutil.copy(ROOT / name, project)
        (project / ".venv").symlink_to(TOOLS)
        return project

    @staticmethod
    def make_check(project: Path) -> subprocess.CompletedProcess[str]:
        command = ["make", "--old-file=.venv/ready", "check"]
        return subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)

    @staticmethod
    def flake_check(project: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
        """Build the check with the programs of `make check`. There are no Nix files, so nixfmt may be any program."""
        nixfmt = tmp_path / "nixfmt/bin"
        nixfmt.mkdir(parents=True)
        (nixfmt / "nixfmt").symlink_to("/bin/true")
        programs = f"""
          ruff = tools;
          shellcheck = tools;
          shfmt = tools;
          treefmt = tools;
          python3.withPackages = _: tools;
          nixfmt.outPath = "{nixfmt.parent}";
        """
        expression = f"""
          let
            {flake(project, programs)}
            tools.outPath = "{TOOLS}";
          in
          flake.checks.x86_64-linux.lints
        """
        return build(expression, tmp_path)

    def test_both_accept_a_clean_project(self, project: Path, tmp_path: Path) -> None:
        checked, built = self.make_check(project), self.flake_check(project, tmp_path)
        assert checked.returncode == 0, checked
        assert built.returncode == 0, built

    @pytest.mark.parametrize(
        ("file", "text", "complaint"),
        [
            pytest.param("a.py", '"""A module."""\n\nTOKEN = "secret"\n', "S105", id="rule of ruff"),
            pytest.param("a.py", '"""A module."""\nX = 1\n', "a.py", id="format of Python"),
            pytest.param("a.sh", '#!/bin/sh\nrm "$1" $2\n', "SC2086", id="rule of shellcheck"),
            pytest.param("a.sh", "#!/bin/sh\nif true; then\n    echo\nfi\n", "a.sh", id="format of shell"),
            pytest.param("harmonia/a.py", '"""A module."""\n\nX: int = "x"\n', "[assignment]", id="types"),
        ],
    )
    def test_both_reject_a_fault(self, project: Path, tmp_path: Path, file: str, text: str, complaint: str) -> None:
        (project / file).write_text(text)
        built = self.flake_check(project, tmp_path)
        checked = self.make_check(project)  # after the other, because it also mends what it can
        for verdict in (checked, built):
            assert verdict.returncode != 0
            assert complaint in verdict.stdout + verdict.stderr

"""The example in CONTRIBUTING.md for adding a resource works, step by step, in a copy of the project."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.pages import ROOT
from support.running import PATIENCE_S

PAGE = (ROOT / "CONTRIBUTING.md").read_text()


def block(name: str) -> str:
    [text] = re.findall(rf"<!-- {re.escape(name)} -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)
    found: str = text
    return found


def run(copy: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=copy, capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )


@pytest.mark.slow
def test_example_resource_works(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for name in ("harmonia", "tests/server", "tests/e2e", "tests/support"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "docs/openapi.json", *(str(it.relative_to(ROOT)) for it in ROOT.glob("tests/*.py"))):
        (copy / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, copy / file)
    (copy / "harmonia/server/resources/references.py").write_text(block("references.py"))
    (copy / "tests/server/test_references.py").write_text(block("test_references.py"))
    routes = copy / "harmonia/server/routes.py"
    text = routes.read_text().replace("    push,\n", "    push,\n    references,\n", 1)
    before = '    Route(uri="/version"'
    routes.write_text(text.replace(before, f"{block('route')}{before}", 1))

    # Its own tests pass, and the two tests for missing documentation fail, as CONTRIBUTING.md describes.
    tests = ("test_references.py", "test_openapi.py", "test_contract.py")
    chosen = "references or every_route or exactly_the_routes"
    done = run(
        copy, "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/server/{name}" for name in tests), "-k", chosen
    )
    assert done.stdout.count("\nFAILED tests/server/test_openapi.py") == 1, done.stdout
    assert done.stdout.count("\nFAILED tests/server/test_contract.py") == 1, done.stdout
    assert "2 failed, 2 passed" in done.stdout
    files = ("harmonia/server/resources/references.py", "harmonia/server/routes.py", "tests/server/test_references.py")
    lints = run(copy, "ruff", "check", "--no-cache", *files)
    assert lints.returncode == 0, lints.stdout

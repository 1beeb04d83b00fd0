"""`harmonia.nix` is a library: its documentation is true, and it has few dependencies."""

import doctest
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harmonia import nix

PAGES = sorted((Path(__file__).parents[1] / "docs/reference/library").glob("*.md"))
MODULES = {module.name for module in pkgutil.iter_modules(nix.__path__, "harmonia.nix.")}
DECOMPRESSION = {f"harmonia.nix.{name}" for name in ("content_coding", "decompress", "nar_check")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_in_the_documentation_work(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.read_text()
    assert text.count("```pycon\n>>> ") == text.count("```pycon")
    assert "```python" not in text
    monkeypatch.chdir(tmp_path)
    examples = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    assert examples.examples or page.stem == "README"
    failures: list[str] = []
    doctest.DocTestRunner().run(examples, out=failures.append)
    assert not failures, "".join(failures)


def test_every_page_is_linked_from_the_first() -> None:
    first = next(page for page in PAGES if page.stem == "README").read_text()
    assert set(re.findall(r"\(([a-z0-9-]+\.md)\)", first)) == {page.name for page in PAGES if page.stem != "README"}


def test_first_page_names_every_module() -> None:
    named = set(re.findall(r"`(?:harmonia\.nix\.)?(\w+)`", (PAGES[0].parent / "README.md").read_text()))
    assert {module.rpartition(".")[2] for module in MODULES} - named == set()


@pytest.mark.parametrize(
    ("modules", "others"),
    [(MODULES - DECOMPRESSION, {"nacl"}), (DECOMPRESSION, {"brotli", "zstandard"})],
    ids=["all others", "decompression"],
)
def test_only_signatures_and_decompression_need_other_packages(modules: set[str], others: set[str]) -> None:
    program = """
import sys
for module in sys.argv[1:]:
    __import__(module)
print(*sorted({name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    at_start = set(done.stdout.split())
    done = subprocess.run([sys.executable, "-c", program, *modules], capture_output=True, text=True, check=True)
    needed = {name for name in set(done.stdout.split()) - at_start if not name.startswith("_")}
    assert needed == {"harmonia"} | others


def test_library_is_marked_as_typed() -> None:
    assert (Path(nix.__path__[0]).parent / "py.typed").exists()

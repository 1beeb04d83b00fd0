"""What the fuzzer starts from, and what it once found, is read as it should be."""

from pathlib import Path

import pytest

from fuzz.nar_reader import check

CORPUS = sorted(Path(__file__).with_name("corpus").iterdir())


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_the_corpus(path: Path) -> None:
    assert check(path.read_bytes()) == path.name.endswith(".nar")

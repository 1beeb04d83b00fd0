"""Generated documents are up to date with the code."""

import pytest

from support.generated import DOCUMENTS, EVALUATED
from support.pages import ROOT


@pytest.mark.parametrize("name", [*DOCUMENTS, *(pytest.param(name, marks=pytest.mark.nix) for name in EVALUATED)])
def test_generated_document_is_up_to_date(name: str) -> None:
    made = {**DOCUMENTS, **EVALUATED}[name]()
    assert (ROOT / name).read_text() == made, f"{name} is out of date: run `make docs`, look at it and commit it"

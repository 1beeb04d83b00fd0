"""Lets atheris look for bytes that break `nar_reader.check`. `make fuzz` calls this with libFuzzer's options."""

import sys

import atheris

with atheris.instrument_imports(include=["harmonia"]):
    from fuzz.nar_reader import check

atheris.Setup(sys.argv, check)
atheris.Fuzz()

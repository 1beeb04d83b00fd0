"""Names of packages are split as by Nix."""

import json
import subprocess
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmonia.nix.package_name import PackageName
from support.programs import needs

LETTERS = "ab1.-_+?="


@pytest.mark.parametrize(
    ("text", "name", "version"),
    [
        ("hello-2.12", "hello", "2.12"),
        ("hello-2.12-man", "hello", "2.12"),
        ("glibc-2.38-44-lib32", "glibc", "2.38-44"),
        ("python3.11-aiohttp-3.9.1", "python3.11-aiohttp", "3.9.1"),
        ("source", "source", ""),
        ("linux-6.6.1-rc1", "linux", "6.6.1-rc1"),
        ("font-unstable-2024-01-02", "font-unstable", "2024-01-02"),
    ],
)
def test_name_version_and_output_are_split(text: str, name: str, version: str) -> None:
    assert PackageName.parse(text) == (name, version)


@given(st.text(LETTERS, min_size=1, max_size=20))
def test_split_loses_only_the_output(text: str) -> None:
    name, version = PackageName.parse(text)
    assert text.startswith(f"{name}-{version}" if version else name)


@pytest.mark.nix
@needs("nix-instantiate")
def test_names_are_those_of_nix() -> None:
    texts = ["".join(letters) for length in range(1, 4) for letters in product(LETTERS, repeat=length)]
    expression = f"map builtins.parseDrvName (builtins.fromJSON ''{json.dumps(texts)}'')"
    command = ["nix-instantiate", "--eval", "--strict", "--json", "--store", "dummy://", "--expr", expression]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [PackageName.parse(text).name for text in texts] == [each["name"] for each in json.loads(done.stdout)]

"""Derivations: whether Nix may substitute what they build."""

import pytest

from harmonia.nix.derivation import allows_substitutes

BEGIN = b'Derive([("out","/nix/store/x-a","","")],[],[],"x86_64-linux","/bin/sh",["-c","true"],['


@pytest.mark.parametrize(
    ("variables", "allowed"),
    [
        (b'("name","a"),("out","/nix/store/x-a")', True),
        (b'("allowSubstitutes",""),("name","a")', False),
        (b'("allowSubstitutes","1"),("name","a")', True),
        (b'("allowSubstitutes","0")', False),  # Nix compares with "1"
        (rb'("name","(\"allowSubstitutes\",\"\")")', True),
        (rb'("__json","{\"allowSubstitutes\":false,\"name\":\"a\"}")', False),
        (rb'("__json","{\"allowSubstitutes\":true}")', True),
        (rb'("__json","{\"env\":{\"allowSubstitutes\":false},\"text\":\"a\\nb\\\"c\"}")', True),
        (rb'("__json","[]")', True),
        (rb'("__json","no JSON")', True),
        (b'("__json","' + b"[" * 100_000 + b'")', True),
        (b"", True),
    ],
)
def test_allow_substitutes_is_found(variables: bytes, allowed: bool) -> None:  # noqa: FBT001 (a parameter of pytest)
    assert allows_substitutes(BEGIN + variables + b"])") is allowed

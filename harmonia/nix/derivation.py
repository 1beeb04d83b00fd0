"""Facts in derivations, the `.drv` files (Nix `src/libstore/derivations.cc`)."""

import json
import re

_STRING = rb'"((?:[^"\\]|\\.)*)"'
_ALLOWS = re.compile(rb'\("allowSubstitutes",' + _STRING + rb"\)", re.DOTALL)
_STRUCTURED = re.compile(rb'\("__json",' + _STRING + rb"\)", re.DOTALL)
_ESCAPE = re.compile(rb"\\(.)", re.DOTALL)
_ESCAPES = {b"n": b"\n", b"r": b"\r", b"t": b"\t"}


def allows_substitutes(derivation: bytes) -> bool:
    """Return False if the derivation sets `allowSubstitutes` to false: Nix then builds it without asking caches.

    In strings, quotes have a backslash before them, so the expressions match only whole variables.
    """
    if structured := _STRUCTURED.search(derivation):
        text = _ESCAPE.sub(lambda match: _ESCAPES.get(match[1], match[1]), structured[1])
        try:
            variables = json.loads(text)
        except (ValueError, RecursionError):
            return True
        return not isinstance(variables, dict) or variables.get("allowSubstitutes", True) is not False
    variable = _ALLOWS.search(derivation)
    return variable is None or variable[1] == b"1"

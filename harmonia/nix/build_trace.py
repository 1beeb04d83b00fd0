"""What the outputs of content-addressed derivations came out as (Nix `src/libstore/realisation.cc`).

Nix up to 2.34 calls that a realisation, and knows the derivation by a hash of all that it is made of. Later it is an
entry of the build trace, under the derivation's own name. A signature is of the compact JSON, its keys sorted.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from harmonia.nix.signing import SecretKey, is_signature
from harmonia.nix.store_path import StorePath


@dataclass(frozen=True, slots=True)
class Realisation:
    out_path: StorePath
    sigs: tuple[str, ...] = ()
    """`name:base64` each, as they are stored."""
    dependent: Mapping[str, StorePath] = field(default_factory=dict)
    """The paths of the realisations that it depends on, by their ids. Nix from 2.34 on knows none."""


def render_realisation(realisation_id: str, realisation: Realisation, keys: Iterable[SecretKey]) -> bytes:
    """The file for Nix up to 2.34, with the stored signatures and those of our `keys`."""
    value = {"dependentRealisations": {}, "id": realisation_id, "outPath": realisation.out_path}
    whole = value | {"dependentRealisations": realisation.dependent}
    # Nix 2.34 does not read what it depends on, and wants signed what it reads; an older one wants all signed.
    sigs = _signatures(realisation, keys, value, whole)
    return _json(whole | {"signatures": sigs})


def render_build_trace(derivation: str, output: str, realisation: Realisation, keys: Iterable[SecretKey]) -> bytes:
    """The file for newer Nixes, likewise."""
    value = {"outPath": realisation.out_path}
    sigs = _signatures(realisation, keys, {"key": {"drvPath": derivation, "outputName": output}, "value": value})
    named = (sig.partition(":") for sig in sigs)
    return _json(value | {"signatures": [{"keyName": name, "sig": sig} for name, _, sig in named]})


def _signatures(realisation: Realisation, keys: Iterable[SecretKey], *signed: Any) -> list[str]:  # noqa: ANN401 (JSON)
    sigs = {sig for sig in realisation.sigs if is_signature(sig)}
    sigs.update(key.sign(_json(value)) for key in keys for value in signed)
    return sorted(sigs)


def _json(value: Any) -> bytes:  # noqa: ANN401 (JSON)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

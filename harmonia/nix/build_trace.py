"""Realisations: the store paths of outputs of content-addressed derivations (Nix `src/libstore/realisation.cc`).

Nix up to 2.34 identifies the derivation by a hash of all its inputs. Later versions call a realisation an entry of the
build trace, and identify the derivation by its store path. A signature signs the compact JSON with sorted keys.
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
    """The stored signatures, each as `name:base64`."""
    dependent: Mapping[str, StorePath] = field(default_factory=dict)
    """The output paths of the realisations that this one depends on, by realisation ID. Empty from Nix 2.34 on."""


def render_realisation(realisation_id: str, realisation: Realisation, keys: Iterable[SecretKey]) -> bytes:
    """Return the JSON file for Nix up to 2.34, with the stored signatures and new ones by our `keys`."""
    value = {"dependentRealisations": {}, "id": realisation_id, "outPath": realisation.out_path}
    with_dependencies = value | {"dependentRealisations": realisation.dependent}
    # Nix 2.34 ignores the dependencies, and verifies a signature without them; older versions verify one with them.
    sigs = _signatures(realisation, keys, value, with_dependencies)
    return _json(with_dependencies | {"signatures": sigs})


def render_build_trace(derivation: str, output: str, realisation: Realisation, keys: Iterable[SecretKey]) -> bytes:
    """Return the JSON file for Nix newer than 2.34, with the stored signatures and new ones by our `keys`."""
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

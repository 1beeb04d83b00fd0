"""Realisations: the store paths of outputs of content-addressed derivations (Nix `src/libstore/realisation.cc`).

Nix up to 2.34 identifies the derivation by a hash of all its inputs. Later versions call a realisation an entry of the
build trace, and identify the derivation by its store path. A signature signs the compact JSON with sorted keys.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from harmonia.errors import FormatError
from harmonia.nix.signing import PublicKey, SecretKey, is_signature
from harmonia.nix.store_path import StorePath


@dataclass(frozen=True, slots=True)
class Realisation:
    out_path: StorePath
    sigs: tuple[str, ...] = ()
    """The stored signatures, each as `name:base64`."""
    dependent: Mapping[str, StorePath] = field(default_factory=dict)
    """The output paths of the realisations that this one depends on, by realisation ID. Empty from Nix 2.34 on."""


def parse_realisation(text: bytes) -> tuple[str, Realisation]:
    """Return the ID and the realisation in a JSON file of Nix up to 2.34. Malformed signatures are dropped.

    Raises FormatError if the file is malformed.
    """
    try:
        value = json.loads(text)
        dependent = {str(name): StorePath(path) for name, path in value.get("dependentRealisations", {}).items()}
        sigs = tuple(filter(is_signature, map(str, value.get("signatures", ()))))
        return str(value["id"]), Realisation(StorePath(value["outPath"]), sigs, dependent)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise FormatError("not the JSON of a realisation") from None


def is_signed(realisation_id: str, realisation: Realisation, keys: Iterable[PublicKey]) -> bool:
    """Return True if one of the keys signed a realisation, as any version of Nix up to 2.34 signs it."""
    messages = list(map(_json, _signed(realisation_id, realisation)))
    return any(key.verify(message, sig) for key in keys for sig in realisation.sigs for message in messages)


def _signed(realisation_id: str, realisation: Realisation) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a signature signs: by Nix 2.34, and by older versions."""
    value = {"dependentRealisations": {}, "id": realisation_id, "outPath": realisation.out_path}
    # Nix 2.34 ignores the dependencies, and verifies a signature without them; older versions verify one with them.
    return value, value | {"dependentRealisations": realisation.dependent}


def render_realisation(realisation_id: str, realisation: Realisation, keys: Iterable[SecretKey]) -> bytes:
    """Return the JSON file for Nix up to 2.34, with the stored signatures and new ones by our `keys`."""
    value, with_dependencies = _signed(realisation_id, realisation)
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

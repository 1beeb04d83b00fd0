"""Entries of the build trace are signed as by Nix 2.35 and newer, which no package of ours has yet.

The key, the entries and the signatures are those of its own tests, which read and write the form in which entries are
served (Nix `src/libstore-tests/realisation.cc` and `data/realisation`). Ed25519 signatures are deterministic.
"""

import json

import pytest

from harmonia.nix.build_trace import Realisation, render_build_trace
from harmonia.nix.signing import SecretKey
from harmonia.nix.store_path import StorePath

KEY = SecretKey.parse(
    "test-key:tU7tTvLcScf8pmz/eTV0BEtLmRsPpZfKaRcd0nCN+pysBZPHSeg61/u2oc7mIOewfuAY1V1BiX32homTaDJ2Jw=="
)
HASH_PART = "g1w7hy3q" * 4
STORED = {"keyName": "asdf", "sig": "A" * 86 + "=="}


@pytest.mark.parametrize(
    ("name", "stored", "sig"),
    [
        ("foo", [], "WsjxK4/EI74COtzMDI+VCjQU9O4FydK0+YeY1CE5hUevogd+T+CPvNXza7oog3GTMS+ZlBwsC2S3ppwusKnJDg=="),
        (
            "foo.drv",
            [STORED],
            "ZE30UrOh26/EYvUaczjJtz6c4WcRYke6IEhDNN5TiFRF6Uu+H8lHofponlhfZxDDrCUlfstS/vtv3Xm2F6M/AA==",
        ),
    ],
)
def test_entry_and_signature_equal_those_of_nix(name: str, stored: list[dict[str, str]], sig: str) -> None:
    output = Realisation(StorePath(f"{HASH_PART}-{name}"), tuple(f"{each['keyName']}:{each['sig']}" for each in stored))
    entry = json.loads(render_build_trace(f"{HASH_PART}-bar.drv", "foo", output, [KEY]))
    assert entry == {
        "outPath": f"{HASH_PART}-{name}",
        "signatures": [*stored, {"keyName": "test-key", "sig": sig}],
    }

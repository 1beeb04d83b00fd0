"""`make audit`: a vulnerability fails it, and packages that could not be checked are counted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

AUDIT = Path(__file__).parents[1] / ".ci/audit.py"
SAFE = {"name": "aiohttp", "version": "3.14.1", "vulns": []}
UNKNOWN = {"name": "sanic", "skip_reason": "the service cannot be reached"}
FLAW = {"id": "PYSEC-2026-1", "fix_versions": ["1.2.1", "1.3"], "aliases": [], "description": ""}
VULNERABLE = {"name": "brotli", "version": "1.2.0", "vulns": [FLAW, {**FLAW, "id": "GHSA-1", "fix_versions": []}]}


@pytest.mark.parametrize(
    ("found", "status", "lines"),
    [
        ([SAFE], 0, ["1 packages checked: no known vulnerability"]),
        (
            [SAFE, VULNERABLE],
            1,
            ["brotli 1.2.0: PYSEC-2026-1; fixed in 1.2.1, 1.3", "brotli 1.2.0: GHSA-1; fixed in none"],
        ),
        (
            [SAFE, UNKNOWN],
            0,
            [
                "SKIPPED: 1 of 2 packages could not be checked; see .audit/log",
                "1 packages checked: no known vulnerability",
            ],
        ),
        (
            [VULNERABLE, UNKNOWN],
            1,
            [
                "brotli 1.2.0: PYSEC-2026-1; fixed in 1.2.1, 1.3",
                "brotli 1.2.0: GHSA-1; fixed in none",
                "SKIPPED: 1 of 2 packages could not be checked; see .audit/log",
            ],
        ),
    ],
)
def test_audit_fails_for_a_vulnerability_only(found: list[object], status: int, lines: list[str]) -> None:
    done = _audit(json.dumps({"dependencies": found, "fixes": []}))
    assert (done.returncode, done.stdout.splitlines()) == (status, lines)


def test_audit_without_output_counts_all_packages_as_unchecked() -> None:
    done = _audit("")
    assert (done.returncode, done.stdout) == (0, "SKIPPED: 1 of 1 packages could not be checked; see .audit/log\n")


def _audit(output: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, AUDIT], input=output, capture_output=True, text=True, check=False)

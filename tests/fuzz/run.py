"""Fuzz all targets, or the given ones, with atheris: `make fuzz`.

A target is a module in `targets`. Its `check` returns True if it accepts the bytes, and fails if the parser misbehaves.
Findings are written to `.fuzz`. Add each fixed finding to the corpus of the target, which the tests replay.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
TARGETS = sorted(path.stem for path in (HERE / "targets").glob("*.py"))
_LONGEST = 4096


def corpus(target: str) -> list[Path]:
    """Return the corpus of a target. Every file whose name does not end in `.bad` must be accepted."""
    return sorted((HERE / "corpus" / target).iterdir())


def longest(module: ModuleType) -> int:
    """Return the maximum length of the inputs for a target."""
    return getattr(module, "LONGEST", _LONGEST)


def fuzz_all(seconds: str, seed: str, *targets: str) -> bool:
    """Fuzz as many targets at a time as there are CPUs. Return True if all passed."""
    names = targets or tuple(TARGETS)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        passed = list(pool.map(partial(_fuzz, seconds, seed), names))
    if failed := [name for name, each in zip(names, passed, strict=True) if not each]:
        print(f"FAILED: {', '.join(failed)}")
    return not failed


def _fuzz(seconds: str, seed: str, target: str) -> bool:
    command = [sys.executable, "-m", "fuzz.run", "--one", target, seconds, seed]
    done = subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    runs = re.search(r"executed_units: ([0-9]+)", done.stdout)
    passed = done.returncode == 0 and runs is not None
    print(f"{target}: {int(runs[1]):,} runs, no failure" if passed and runs else f"{done.stdout}\n{target}: FAILED")
    return passed


def fuzz_one(target: str, seconds: str, seed: str) -> None:
    import atheris  # noqa: PLC0415 (tests of the corpus run without atheris)

    with atheris.instrument_imports(include=["harmonia", "sanic.http", "sanic.request", "sanic.headers"]):
        module = import_module(f"fuzz.targets.{target}")
    work = Path(".fuzz") / target
    work.mkdir(parents=True, exist_ok=True)
    words = ['"' + "".join(map(r"\x{:02x}".format, word)) + '"\n' for word in module.WORDS]
    (work / "words").write_text("".join(words))
    (work / "corpus").mkdir(exist_ok=True)
    options = [f"-max_total_time={seconds}", f"-seed={seed}", f"-max_len={longest(module)}", "-timeout=25"]
    options += ["-rss_limit_mb=1024", f"-dict={work}/words", f"-artifact_prefix={work}/", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, str(work / "corpus"), str(HERE / "corpus" / target)], module.check)
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        fuzz_one(*sys.argv[2:])
    else:
        sys.exit(not fuzz_all(*sys.argv[1:]))

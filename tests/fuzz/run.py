"""Lets atheris look for bytes that break one of the targets, or all of them in turn: `make fuzz`.

A target is a module in `targets`, whose `check` says whether it takes some bytes, and fails where it does not as it
should. What atheris finds goes to `.fuzz`. Once it is mended it belongs in the target's corpus, which the tests replay.
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
    """What the target is tried with in any case. It has to take what has no name that ends in `.bad`."""
    return sorted((HERE / "corpus" / target).iterdir())


def longest(module: ModuleType) -> int:
    """So many bytes have to be enough to find anything."""
    return getattr(module, "LONGEST", _LONGEST)


def fuzz_all(seconds: str, seed: str, *targets: str) -> bool:
    """As many at a time as there are processors. Whether nothing was found."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return all(list(pool.map(partial(_fuzz, seconds, seed), targets or TARGETS)))


def _fuzz(seconds: str, seed: str, target: str) -> bool:
    command = [sys.executable, "-m", "fuzz.run", "--one", target, seconds, seed]
    done = subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    tried = re.search(r"executed_units: ([0-9]+)", done.stdout)
    well = done.returncode == 0 and tried is not None
    print(f"{target}: {int(tried[1]):,} tries, all well" if well and tried else f"{done.stdout}\n{target}: FAILED")
    return well


def fuzz_one(target: str, seconds: str, seed: str) -> None:
    import atheris  # noqa: PLC0415 (the tests of the corpora have none)

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

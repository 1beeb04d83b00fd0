"""Benchmarks with a table and JSON: `make bench`, or python -m benchmarks [--short] [--docs] [QUESTION…].

Needs `PYTHONPATH=tests`.
The store is created once and kept in $XDG_CACHE_HOME/harmonia/bench or ~/.cache/harmonia/bench. The short form takes
two minutes, and fails if a ratio has collapsed. QUESTION is the name of a function in measure.py.
"""

import argparse
import os
import sys
from pathlib import Path

from benchmarks import measure, report
from benchmarks.figures import Figure  # noqa: TC001 (imported at run time anyway)
from benchmarks.store import FULL, SHORT, BenchStore

_COLLAPSED = 0.25  # share of a target; lower ratios are not noise of the machine


def main() -> None:
    questions = {function.__name__: function for function in measure.ALL}
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--short", action="store_true", help="use a small store, and fail if a ratio has collapsed")
    parser.add_argument("--docs", action="store_true", help="write to docs/explanation instead of bench-results")
    parser.add_argument("--keep", action="store_true", help="keep earlier figures that are not measured now")
    parser.add_argument("questions", nargs="*", choices=[*questions, []], metavar="QUESTION")
    arguments = parser.parse_args()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    store = BenchStore(Path(cache, "harmonia", "bench"), SHORT if arguments.short else FULL)
    missing = [program for program, found in measure.HAVE.items() if not found]
    if missing:
        print(f"not installed, so measurements with these are skipped: {', '.join(missing)}")
    figures: list[Figure] = []
    directory = Path("docs/explanation" if arguments.docs else "bench-results")
    for name in arguments.questions or questions:
        print(f"{name}:", flush=True)
        figures += questions[name](store)
        report.write(directory, store, figures, keep=arguments.keep)
    collapsed = [figure.what for figure in figures if figure.collapsed(_COLLAPSED)]
    if arguments.short and collapsed:
        sys.exit(f"collapsed: {'; '.join(collapsed)}")


if __name__ == "__main__":
    main()

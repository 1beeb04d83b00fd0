"""Measure, and write a table, JSON and a plot: `make bench`, or python -m benchmarks [--short] [--docs] [QUESTION…].

The store is made once, and kept in $XDG_CACHE_HOME/harmonia/bench or ~/.cache/harmonia/bench. The short form takes two
minutes, and fails where a ratio has collapsed. QUESTION is a function of measure.py.
"""

import argparse
import os
import sys
from pathlib import Path

from benchmarks import measure, report
from benchmarks.figures import Figure  # noqa: TC001 (it is the same code that runs)
from benchmarks.store import FULL, SHORT, BenchStore

_COLLAPSED = 0.25  # of a target: no noise of a machine explains that


def main() -> None:
    questions = {function.__name__: function for function in measure.ALL}
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--short", action="store_true", help="a small store, and failure if a ratio collapsed")
    parser.add_argument("--docs", action="store_true", help="write into docs/explanation instead of bench-results")
    parser.add_argument("questions", nargs="*", choices=[*questions, []], metavar="QUESTION")
    arguments = parser.parse_args()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    store = BenchStore(Path(cache, "harmonia", "bench"), SHORT if arguments.short else FULL)
    missing = [program for program, found in measure.HAVE.items() if not found]
    if missing:
        print(f"not installed, so that what needs it is not measured: {', '.join(missing)}")
    figures: list[Figure] = []
    for name in arguments.questions or questions:
        print(f"{name}:", flush=True)
        figures += questions[name](store)
    report.write(Path("docs/explanation" if arguments.docs else "bench-results"), store, figures)
    collapsed = [figure.what for figure in figures if figure.collapsed(_COLLAPSED)]
    if arguments.short and collapsed:
        sys.exit(f"collapsed: {'; '.join(collapsed)}")


if __name__ == "__main__":
    main()

"""Report of the benchmarks: a table, JSON, and a plot of the ratios."""

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from benchmarks.figures import Figure
from benchmarks.servers import HARMONIA
from benchmarks.store import MIB, BenchStore

_BEGIN, _END = "<!-- benchmarks begin -->\n", "<!-- benchmarks end -->\n"
_NAME = "benchmarks"


def write(directory: Path, store: BenchStore, figures: Sequence[Figure]) -> None:
    """Write `benchmarks.md` (between its marks, if it has them), `benchmarks.json` and `benchmarks.png`."""
    directory.mkdir(exist_ok=True)
    circumstances = _circumstances(store)
    table = "\n".join([*(f"- {name}: {value}" for name, value in circumstances.items()), "", *_table(figures), ""])
    print(f"\n{table}")
    text = directory / f"{_NAME}.md"
    before, _, rest = (text.read_text() if text.exists() else _BEGIN + _END).partition(_BEGIN)
    text.write_text(f"{before}{_BEGIN}{table}{_END}{rest.partition(_END)[2]}")
    document = circumstances | {"figures": [asdict(figure) | {"ratio": figure.ratio} for figure in figures]}
    (directory / f"{_NAME}.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    try:
        _plot(directory / f"{_NAME}.png", figures)
    except ImportError:
        print("matplotlib is not installed, so no plot was written: pip install -e '.[bench]'")


def _table(figures: Sequence[Figure]) -> list[str]:
    rows = [[figure.what, *_cells(figure)] for figure in figures]
    header = ["", HARMONIA, "compared with", "ratio", "target"]
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def _cells(figure: Figure) -> list[str]:
    others = ", ".join(f"{name} {_number(figure.median(name))}" for name in figure.values if name != HARMONIA)
    ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}"
    bound = figure.at_least if figure.at_least is not None else figure.at_most
    sign = "≥" if figure.at_least is not None else "≤"
    target = "" if bound is None else f"{sign} {bound:.3g}{'' if figure.reference else f' {figure.unit}'}"
    if figure.reached is not None:
        target += " ✓" if figure.reached >= 1 else " ✗"
    return [f"{_number(figure.median(HARMONIA))} {figure.unit}", others, ratio, target]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _circumstances(store: BenchStore) -> dict[str, str]:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    modules = [f"{name} {version(name)}" for name in ("sanic", "uvloop", "zstandard")]
    programs = (("nginx", "-v"), ("nix", "--version"), ("zstd", "--version"), ("wrk", "-v"))
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} processors ({model[1] if model else platform.machine()}), {memory:.0f} GiB, "
        f"Linux {platform.release()}; 1-minute load at the end {os.getloadavg()[0]:.1f}",
        "versions": ", ".join(
            [f"Python {platform.python_version()}", *modules, *filter(None, (_version(*each) for each in programs))]
        ),
        "store": f"a closure of {len(store.closure)} paths, {store.closure_size / MIB:,.0f} MiB of NARs; "
        f"a path of {store.form.many:,} small files, {store.many.nar_size / MIB:,.0f} MiB; "
        f"a file of {store.large.nar_size / MIB:,.0f} MiB",
    }


def _version(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    number = re.search(r"\d+\.\d+(\.\d+)?", done.stdout + done.stderr)
    return f"{command[0]} {number[0]}" if number else command[0]


def _plot(path: Path, figures: Sequence[Figure]) -> None:
    """Plot a bar for each ratio, longer is better, with a mark at its target."""
    import matplotlib as mpl  # noqa: PLC0415 (optional dependency)

    mpl.use("agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    compared = [(figure, _speed(figure, figure.ratio)) for figure in reversed(figures) if figure.ratio is not None]
    if not compared:
        return
    plot, axes = plt.subplots(figsize=(10, 1 + 0.3 * len(compared)), layout="constrained")
    labels = [f"{figure.what} : {figure.reference}" for figure, _ in compared]
    bars = axes.barh(labels, [speed for _, speed in compared], color="#5277c3")
    axes.bar_label(bars, fmt=" %.2f", fontsize=8)
    for number, (figure, _) in enumerate(compared):
        target = figure.at_least if figure.at_least is not None else figure.at_most
        if target is not None:
            axes.plot([_speed(figure, target)] * 2, [number - 0.4, number + 0.4], color="#d04020")
    axes.axvline(1, color="black", linewidth=0.5)
    axes.set_xscale("log")
    axes.set_title("Speed, compared with others (red: the target)")
    axes.tick_params(labelsize=8)
    plot.savefig(path, dpi=110)


def _speed(figure: Figure, ratio: float) -> float:
    """Return the speed-up for a ratio. A ratio of times is inverted, so that more is faster."""
    return 1 / ratio if figure.unit in {"s", "ms", "µs"} else ratio

"""Report of the benchmarks: a table and JSON."""

import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path

from benchmarks.figures import Figure
from benchmarks.servers import HARMONIA, OTHER_NAME
from benchmarks.store import MIB, BenchStore

_BEGIN, _END = "<!-- benchmarks begin -->\n", "<!-- benchmarks end -->\n"
_NAME = "benchmarks"


def write(directory: Path, store: BenchStore, figures: Sequence[Figure], *, keep: bool = False) -> None:
    """Write `benchmarks.md` (between its marks, if it has them) and `benchmarks.json`.

    With `keep`, earlier figures of `benchmarks.json` that were not measured now stay.
    """
    directory.mkdir(exist_ok=True)
    if keep:
        figures = _with_earlier(directory / f"{_NAME}.json", figures)
    circumstances = _circumstances(store)
    table = "\n".join([*(f"- {name}: {value}" for name, value in circumstances.items()), "", *_table(figures), ""])
    print(f"\n{table}")
    text = directory / f"{_NAME}.md"
    before, _, rest = (text.read_text() if text.exists() else _BEGIN + _END).partition(_BEGIN)
    text.write_text(f"{before}{_BEGIN}{table}{_END}{rest.partition(_END)[2]}")
    document = circumstances | {"figures": [asdict(figure) | _derived(figure) for figure in figures]}
    (directory / f"{_NAME}.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def _derived(figure: Figure) -> dict[str, object]:
    return {"ratio": figure.ratio, "speeds": {name: figure.speed(name) for name in figure.values if name != HARMONIA}}


def _with_earlier(path: Path, figures: Sequence[Figure]) -> Sequence[Figure]:
    names = {each.name for each in fields(Figure)}
    earlier = json.loads(path.read_text())["figures"] if path.exists() else []
    kept = [Figure(**{name: each[name] for name in names & each.keys()}) for each in earlier]
    measured = {figure.what for figure in figures}
    return [*(figure for figure in kept if figure.what not in measured), *figures]


def _table(figures: Sequence[Figure]) -> list[str]:
    rows = [[figure.what, *_cells(figure)] for figure in figures]
    header = ["", HARMONIA, "compared with", "ratio", "target", f"speed : {OTHER_NAME}", "target", "processor time"]
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def _cells(figure: Figure) -> list[str]:
    others = ", ".join(f"{name} {_number(figure.median(name))}" for name in figure.values if name != HARMONIA)
    ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}"
    bound = figure.at_least if figure.at_least is not None else figure.at_most
    sign = "≥" if figure.at_least is not None else "≤"
    target = "" if bound is None else f"{sign} {bound:.3g}{'' if figure.reference else f' {figure.unit}'}"
    if figure.reached is not None:
        target += " ✓" if figure.reached >= 1 else " ✗"
    return [f"{_number(figure.median(HARMONIA))} {figure.unit}", others, ratio, target, *_other(figure), _cpu(figure)]


def _other(figure: Figure) -> list[str]:
    """Return the cells for the speed compared with the server of BENCH_OTHER."""
    speed = figure.speed(OTHER_NAME)
    if speed is None:
        return ["", ""]
    least = figure.other_at_least
    return [f"{speed:.2f}", "" if least is None else f"≥ {least:g} {'✓' if speed >= least else '✗'}"]


def _cpu(figure: Figure) -> str:
    """Return the medians of the processor time, ours first."""
    names = sorted(figure.cpu, key=lambda name: name != HARMONIA)
    medians = ", ".join(
        f"{'' if name == HARMONIA else f'{name} '}{statistics.median(figure.cpu[name]):.3g}" for name in names
    )
    return f"{medians} s/{figure.work}" if medians else ""


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

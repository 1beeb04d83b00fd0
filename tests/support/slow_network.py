"""The table and the picture of substitutions over slow networks, from docs/explanation/slow-network.json.

`python -m benchmarks.closure --docs` measures.
"""

import json
from collections.abc import Iterator
from typing import Any

from support.pages import ROOT

_MEASURED = ROOT / "docs/explanation/slow-network.json"
_WAYS = ("direct", "plain", "accelerated")
_PATHS, _MBIT = 150, 100
"""The cases in the picture."""
_LEFT_PX, _MAX_PX = 150, 560
"""Left end of the bars, and the length of the longest."""
_BAR_PX, _ROW_PX, _TITLE_PX = 11, 46, 30


def _cases() -> dict[tuple[int, tuple[int, ...], int, int], dict[str, float]]:
    """Return the seconds of each way by the paths, the version of Nix, the latency and the bandwidth."""
    cases: dict[tuple[int, tuple[int, ...], int, int], dict[str, float]] = {}
    rows: list[dict[str, Any]] = json.loads(_MEASURED.read_text())
    for row in sorted(rows, key=lambda row: (row["paths"], _version(row["nix"]), row["ms"], row["mbit"])):
        case = row["paths"], _version(row["nix"]), row["ms"], row["mbit"]
        cases.setdefault(case, {})[row["way"]] = row["s"]
    return cases


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def table() -> str:
    rows = [
        "| paths | Nix | latency, ms | Mbit/s | direct | plain | accelerated | of direct |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (paths, nix, latency, mbit), seconds in _cases().items():
        times = [f"{seconds[way]:.1f}" for way in _WAYS]
        share = seconds["accelerated"] / seconds["direct"]
        version = ".".join(map(str, nix))
        rows.append(f"| {paths} | {version} | {latency} | {mbit:,} | {' | '.join(times)} | {share:.2f} |")
    return "\n".join(rows)


def _bars(seconds: dict[str, float], top: int, longest: float) -> Iterator[str]:
    for number, way in enumerate(_WAYS):
        length = max(round(seconds[way] / longest * _MAX_PX), 1)
        y = top + number * (_BAR_PX + 1)
        yield f'  <rect class="{way}" x="{_LEFT_PX}" y="{y}" width="{length}" height="{_BAR_PX}"/>'
        yield f'  <text class="number" x="{_LEFT_PX + length + 5}" y="{y + 10}">{seconds[way]:.1f} s</text>'


def chart() -> str:
    """Return an SVG with a bar for each way, for each version of Nix and each latency."""
    cases = {case[1:3]: seconds for case, seconds in _cases().items() if (case[0], case[3]) == (_PATHS, _MBIT)}
    longest = max(max(seconds.values()) for seconds in cases.values())
    rows = []
    top = 34
    shown: tuple[int, ...] = ()
    for (nix, latency), seconds in cases.items():
        if nix != shown:
            shown = nix
            rows.append(f'  <text class="title" x="10" y="{top + 18}">Nix {".".join(map(str, nix))}</text>')
            top += _TITLE_PX
        rows.append(f'  <text x="{_LEFT_PX - 10}" y="{top + 22}" text-anchor="end">latency {latency} ms</text>')
        rows.extend(_bars(seconds, top, longest))
        top += _ROW_PX
    legend = []
    for number, way in enumerate(_WAYS):
        x = 10 + 130 * number
        legend.append(f'  <rect class="{way}" x="{x}" y="10" width="12" height="12"/>')
        legend.append(f'  <text x="{x + 18}" y="21">{way}</text>')
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {top}" width="800" height="{top}">',
            "  <style>",
            "    text { font: 14px sans-serif; fill: #24292f; }",
            "    .number { font-size: 11px; }",
            "    .title { font-weight: bold; }",
            "    .direct { fill: #9aa5b1; }",
            "    .plain { fill: #c9a227; }",
            "    .accelerated { fill: #5277c3; }",
            "    @media (prefers-color-scheme: dark) { text { fill: #e6edf3; } }",
            "  </style>",
            *legend,
            *rows,
            "</svg>\n",
        ]
    )

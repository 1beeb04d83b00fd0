"""The chart of README.md: speed compared with Rust Harmonia and nginx, drawn from docs/explanation/benchmarks.json."""

import json
import math
from collections.abc import Iterator

from support.pages import ROOT

_MEASURED = ROOT / "docs/explanation/benchmarks.json"
_GROUPS = {
    "Ask for path info": {
        "narinfo, the first time, one after the other": "the first time",
        "narinfo of a different path each time, 25 connections": "a different path each time, 25 connections",
        "narinfo, 25 connections, 20 commits a second": "while builds commit, 25 connections",
        "narinfo, 25 connections": "again, 25 connections",
        "narinfo, 404, 25 connections": "missing paths (404), 25 connections",
    },
    "Download a closure": {
        "closure, identity": "plain, 1 connection",
        "closure, identity, 16 connections": "plain, 16 connections",
        "closure, .nar.zst, 16 connections, cold": "compressed the first time, 16 connections",
        "closure, .nar.zst, warm": "compressed, 1 connection",
        "closure, .nar.zst, 16 connections, warm": "compressed, 16 connections",
        "narinfos and NARs of the closure, zstd, 25 connections": "with path infos, compressed, 25 connections",
    },
    "Download one large file": {"large file, identity": "plain", "large file, .nar.zst, warm": "compressed"},
}
_OTHERS = {"Rust Harmonia": "rust", "nginx": "nginx"}
_LEFT_PX, _EVEN_PX, _DOUBLE_PX = 330, 620, 45
"""Right edge of the labels, the line of equal speed, and the length of a bar for twice the speed."""
_MAX_DOUBLINGS = 5
_BAR_PX, _ROW_PX, _TITLE_PX = 11, 30, 30


def _bars(speeds: dict[str, float], top: int) -> Iterator[str]:
    for number, (name, style) in enumerate((name, style) for name, style in _OTHERS.items() if speeds.get(name)):
        speed = speeds[name]
        length = round(min(abs(math.log2(speed)), _MAX_DOUBLINGS) * _DOUBLE_PX)
        left = _EVEN_PX if speed >= 1 else _EVEN_PX - length
        y = top + number * (_BAR_PX + 1)
        yield f'  <rect class="{style}" x="{left}" y="{y}" width="{max(length, 1)}" height="{_BAR_PX}"/>'
        at, anchor = (_EVEN_PX + length + 5, "start") if speed >= 1 else (_EVEN_PX - length - 5, "end")
        yield f'  <text class="number" x="{at}" y="{y + 10}" text-anchor="{anchor}">{speed:.2g}</text>'


def speed_chart() -> str:
    """Return an SVG with two bars for each chosen figure: to the right of the line, Harmonia is faster."""
    figures = {figure["what"]: figure for figure in json.loads(_MEASURED.read_text())["figures"]}
    rows = []
    top = 44
    for title, labels in _GROUPS.items():
        rows.append(f'  <text class="title" x="10" y="{top + 18}">{title}</text>')
        top += _TITLE_PX
        for what, label in labels.items():
            rows.append(f'  <text x="{_LEFT_PX}" y="{top + 15}" text-anchor="end">{label}</text>')
            rows.extend(_bars(figures[what]["speeds"], top))
            top += _ROW_PX
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 840 {top + 8}" width="840" height="{top + 8}">',
            "  <style>",
            "    text { font: 14px sans-serif; fill: #24292f; }",
            "    .number { font-size: 11px; }",
            "    .title { font-weight: bold; }",
            "    .rust { fill: #5277c3; }",
            "    .nginx { fill: #9aa5b1; }",
            "    path { stroke: #d04020; stroke-width: 2; }",
            "    @media (prefers-color-scheme: dark) { text { fill: #e6edf3; } }",
            "  </style>",
            '  <rect class="rust" x="10" y="10" width="12" height="12"/>',
            '  <text x="28" y="21">compared with Rust Harmonia</text>',
            '  <rect class="nginx" x="250" y="10" width="12" height="12"/>',
            '  <text x="268" y="21">with nginx, which serves finished files</text>',
            f'  <text x="{_EVEN_PX - 8}" y="38" text-anchor="end">slower ←</text>',
            f'  <text x="{_EVEN_PX + 8}" y="38">→ faster</text>',
            *rows,
            f'  <path d="M{_EVEN_PX} 28V{top}"/>',
            "</svg>\n",
        ]
    )

"""The chart of README.md: speed compared with nginx, drawn from docs/explanation/benchmarks.json."""

import json
import statistics
from typing import Any

from support.pages import ROOT

_MEASURED = ROOT / "docs/explanation/benchmarks.json"
_ROWS = {
    "narinfo, 25 connections": "path info (narinfo), 25 connections",
    "narinfo, 404, 25 connections": "missing path (404), 25 connections",
    "large file, .nar.zst, warm": "4 GiB file, compressed",
    "large file, identity": "4 GiB file, plain",
    "nix copy of the closure, .nar.zst, warm": "nix copy of 749 paths, compressed",
    "closure, .nar.zst, warm": "749 NARs, compressed",
    "closure, identity": "749 NARs, plain",
}
_OURS, _RUST, _NGINX = "Harmonia", "Rust Harmonia", "nginx"
_TIMES = {"s", "ms", "µs"}
_LEFT_PX, _TOP_PX, _ROW_PX = 270, 34, 32
_THIN_PX = 8
_LONGEST_PX = 440
"""Length of the longest bar. The numbers are to the right of it."""
_STYLE = """\
    text { font: 14px sans-serif; fill: #24292f; }
    .number { font-weight: bold; }
    .rust { font-size: 11px; font-weight: normal; }
    rect { fill: #5277c3; }
    rect.rust { fill: #b7410e; }
    path { stroke: #57606a; stroke-width: 2; stroke-dasharray: 4 3; }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3; }
      rect { fill: #6f93dd; }
      rect.rust { fill: #e0784a; }
      path { stroke: #9198a1; }
    }"""


def speed_chart() -> str:
    """Return an SVG with bars for each chosen figure, and a line at the speed of nginx."""
    figures = {figure["what"]: figure for figure in json.loads(_MEASURED.read_text())["figures"]}
    rows = {label: (_speed(figures[what], _OURS), _speed(figures[what], _RUST)) for what, label in _ROWS.items()}
    longest = max(speed for row in rows.values() for speed in (*row, 1.0) if speed is not None)
    nginx_px = _LONGEST_PX / longest
    lines = []
    for number, (label, (ours, rust)) in enumerate(rows.items()):
        top = _TOP_PX + number * _ROW_PX
        lines += [f'  <text x="{_LEFT_PX - 10}" y="{top + 13}" text-anchor="end">{label}</text>']
        lines += _bar(ours, nginx_px, top, 16, "ours")
        lines += _bar(rust, nginx_px, top + 17, _THIN_PX, "rust")
    bottom = _TOP_PX + len(rows) * _ROW_PX
    line = _LEFT_PX + round(nginx_px)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 780 {bottom}" width="780" height="{bottom}">',
            f"  <style>\n{_STYLE}\n  </style>",
            *(_legend() if any(rust is not None for _, rust in rows.values()) else []),
            *lines,
            f'  <path d="M{line} 26V{bottom - 4}"/>',
            f'  <text x="{line}" y="18" text-anchor="middle">nginx, the same content as static files = 1</text>',
            "</svg>\n",
        ]
    )


def _speed(figure: dict[str, Any], server: str) -> float | None:
    """Return the speed of a server compared with nginx, from the median of the rounds, or None if not measured."""
    values = figure["values"]
    if server not in values:
        return None
    ratio: float = statistics.median([own / nginx for own, nginx in zip(values[server], values[_NGINX], strict=True)])
    return 1 / ratio if figure["unit"] in _TIMES else ratio


def _bar(speed: float | None, nginx_px: float, top: int, height: int, style: str) -> list[str]:
    if speed is None:
        return []
    length, baseline = round(speed * nginx_px), top + (13 if height > _THIN_PX else 9)
    return [
        f'  <rect class="{style}" x="{_LEFT_PX}" y="{top}" width="{length}" height="{height}" rx="2"/>',
        f'  <text class="number {style}" x="775" y="{baseline}" text-anchor="end">{speed:.2f}</text>',
    ]


def _legend() -> list[str]:
    lines = []
    for number, (style, name) in enumerate([("ours", _OURS), ("rust", _RUST)]):
        left = 10 + number * 100
        lines += [
            f'  <rect class="{style}" x="{left}" y="8" width="12" height="12" rx="2"/>',
            f'  <text x="{left + 18}" y="18">{name}</text>',
        ]
    return lines

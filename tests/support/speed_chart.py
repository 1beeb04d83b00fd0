"""The chart of README.md: speed compared with nginx, drawn from docs/explanation/benchmarks.json."""

import json

from support.pages import ROOT

_MEASURED = ROOT / "docs/explanation/benchmarks.json"
_BARS = {
    "narinfo, 25 connections": "path info (narinfo), 25 connections",
    "narinfo, 404, 25 connections": "missing path (404), 25 connections",
    "large file, .nar.zst, warm": "4 GiB file, compressed",
    "large file, identity": "4 GiB file, plain",
    "nix copy of the closure, .nar.zst, warm": "nix copy of 749 paths, compressed",
    "closure, .nar.zst, warm": "749 NARs, compressed",
    "closure, identity": "749 NARs, plain",
}
_TIMES = {"s", "ms", "µs"}
_LEFT_PX, _NGINX_PX, _ROW_PX = 270, 260, 26


def speed_chart() -> str:
    """Return an SVG with a bar for each chosen figure; a bar as long as nginx's ends at the line."""
    figures = {figure["what"]: figure for figure in json.loads(_MEASURED.read_text())["figures"]}
    rows = []
    for number, (what, label) in enumerate(_BARS.items()):
        figure = figures[what]
        if figure["reference"] != "nginx":
            raise ValueError(f"{what} is compared with {figure['reference']}, not with nginx")
        speed = 1 / figure["ratio"] if figure["unit"] in _TIMES else figure["ratio"]
        top = 34 + number * _ROW_PX
        length = round(speed * _NGINX_PX)
        rows += [
            f'  <text x="{_LEFT_PX - 10}" y="{top + 14}" text-anchor="end">{label}</text>',
            f'  <rect x="{_LEFT_PX}" y="{top}" width="{length}" height="18" rx="3"/>',
            f'  <text x="{_LEFT_PX + length - 7}" y="{top + 14}" text-anchor="end" class="number">{speed:.2f}</text>',
        ]
    height = 34 + len(_BARS) * _ROW_PX + 6
    line = _LEFT_PX + _NGINX_PX
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 780 {height}" width="780" height="{height}">',
            "  <style>",
            "    text { font: 14px sans-serif; fill: #24292f; }",
            "    .number { font-weight: bold; fill: #ffffff; }",
            "    rect { fill: #5277c3; }",
            "    path { stroke: #d04020; stroke-width: 2; stroke-dasharray: 4 3; }",
            "    @media (prefers-color-scheme: dark) { text { fill: #e6edf3; } .number { fill: #ffffff; } }",
            "  </style>",
            *rows,
            f'  <path d="M{line} 26V{height - 4}"/>',
            f'  <text x="{line}" y="18" text-anchor="middle">nginx, the same content as static files = 1</text>',
            "</svg>\n",
        ]
    )

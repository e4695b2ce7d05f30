"""The plot for the README: one SVG file, drawn by hand so that nothing need be installed, legible on light and dark.

A group of bars for each line, an engine a bar, as long as its speed relative to the best peer of that line (at 1).
Knows nothing but the file of results.
"""

from __future__ import annotations

from html import escape
from typing import Any

from peerlib.lines import Line
from peerlib.results import OURS, TITLES

ORDER = (OURS, "llama.cpp", "ik_llama.cpp", "openvino")
FEW = 5
"""Fewer samples than this are said beside the bar."""
WIDTH, LEFT, RIGHT, BAR, GAP, TOP = 760, 190, 130, 14, 18, 64
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1f2328 } .small { font-size: 11px; fill: #59636e }
.e0 { fill: #0969da } .e1 { fill: #8c959f } .e2 { fill: #bc8cff } .e3 { fill: #d4a72c } .e4 { fill: #57ab5a }
.axis { stroke: #59636e; stroke-dasharray: 3 3 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .small { fill: #9198a1 } .e0 { fill: #4493f8 } .e1 { fill: #6e7681 } .axis { stroke: #9198a1 }
}
"""


def draw(lines: dict[str, Line], data: dict[str, Any], title: str) -> str:
    """The SVG text."""
    groups = [(line, found) for line, found in _measured(lines, data) if "ratio" in found]
    engines = [name for name in ORDER if any(name in found["engines"] for _, found in groups)]
    engines += sorted({name for _, found in groups for name in found["engines"]} - set(engines))
    speeds = {line.name: _relative(line, found) for line, found in groups}
    longest = max((value for found in speeds.values() for value in found.values()), default=1.0)
    scale = (WIDTH - LEFT - RIGHT) / longest
    parts: list[str] = []
    y = TOP
    for line, found in groups:
        mine = [name for name in engines if name in speeds[line.name]]
        middle = y + len(mine) * BAR / 2 + 4
        parts.append(f'<text x="{LEFT - 10}" y="{middle:.0f}" text-anchor="end">{escape(line.name)}</text>')
        for name in mine:
            length = speeds[line.name][name] * scale
            figures = found["engines"][name][line.metric]
            value = f"{figures['median']:.{0 if figures['median'] >= 100 else 1}f} {TITLES[line.metric]}"
            if figures["samples"] < FEW:
                value += f" (n = {figures['samples']})"
            kind = f"e{min(engines.index(name), 4)}"
            parts.append(f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR - 2}" rx="2"/>')
            parts.append(f'<text class="small" x="{LEFT + length + 5:.1f}" y="{y + 10}">{value}</text>')
            y += BAR
        y += GAP
    one = LEFT + scale
    axis = f'<line class="axis" x1="{one:.1f}" x2="{one:.1f}" y1="{TOP - 6}" y2="{y - GAP + 4}"/>'
    note = f'<text class="small" x="{one:.1f}" y="{TOP - 10}" text-anchor="middle">best peer</text>'
    legend = "".join(
        f'<rect class="e{min(i, 4)}" x="{LEFT + 120 * i}" y="28" width="10" height="10" rx="2"/>'
        f'<text class="small" x="{LEFT + 120 * i + 15}" y="37">{escape(name)}</text>'
        for i, name in enumerate(engines)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" role="img">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
        f'<text x="{LEFT}" y="16">{escape(title)}</text>{legend}{axis}{note}{"".join(parts)}</svg>\n'
    )


def _measured(lines: dict[str, Line], data: dict[str, Any]) -> list[tuple[Line, dict[str, Any]]]:
    records = data["lines"]
    return [(line, records[name]["summary"]) for name, line in lines.items() if records.get(name, {}).get("summary")]


def _relative(line: Line, found: dict[str, Any]) -> dict[str, float]:
    """Engine -> speed, 1 for the best peer; longer is faster for times too."""
    medians = {n: f[line.metric]["median"] for n, f in found["engines"].items() if line.metric in f}
    best = medians[found["best_peer"]]
    return {n: best / m if line.lower_is_better else m / best for n, m in medians.items()}

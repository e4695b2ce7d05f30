"""What the results say: the table in Markdown, and the Pareto front as one SVG file, drawn by hand so that nothing need
be installed, legible on light and dark. Knows nothing but the file of results."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from compressionlib.ways import WAYS

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 440, 64, 24, 40, 48
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1f2328 } .small { font-size: 10px; fill: #59636e }
.on { fill: #0969da } .off { fill: #8c959f } .front { stroke: #0969da; fill: none; stroke-width: 1.5 }
.axis { stroke: #59636e } .grid { stroke: #59636e; stroke-opacity: 0.2 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .small { fill: #9198a1 } .on { fill: #4493f8 } .front { stroke: #4493f8 }
  .off { fill: #6e7681 } .axis, .grid { stroke: #9198a1 }
}
"""
HEADS = {
    "en": "| way | point | KL, nats/token | KL p99 | top-1 | perplexity | MB a step | ms/token |",
    "zh": "| 方法 | 工作点 | KL，奈特/词元 | KL p99 | top-1 | 困惑度 | 每步 MB | ms/词元 |",
}


WORDS = {
    "rounded to nearest": "按最近值舍入",
    "then to nearest": "再按最近值舍入",
    "without a second plane": "没有第二平面",
    "static order": "静态次序",
    "natural order": "自然次序",
    "made up for": "有补偿",
    "cut first, then GPTQ": "先剪，再 GPTQ",
    "then GPTQ": "再 GPTQ",
    "(stored as 4)": "（按 4 比特存放）",
    "3 bits": "3 比特",
    " and ": " 加 ",
    "group": "组",
    "rotated": "旋转",
    "structured": "结构化",
    "neurons": "神经元",
    "KV groups": "KV 组",
    "layers": "层",
    "tiles": "分块",
    "magnitude": "幅度",
    "joint": "联合",
    "uniform": "均匀",
    ", ": "，",
}
"""What titles say in Chinese; longer words first."""


def title(name: str, language: str) -> str:
    """Of a way."""
    text = WAYS[name].title
    for english, chinese in WORDS.items() if language == "zh" else ():
        text = text.replace(english, chinese)
    return text


def rows(records: dict[str, dict[str, Any]], times: dict[str, dict[str, float]]) -> list[tuple[str, str, Any, Any]]:
    """(way, point, figures, ms a token) in the order of `WAYS`."""
    found = []
    for name in WAYS:
        if name in records:
            for point, figures in records[name]["points"].items():
                found.append((name, point, figures, times.get(name, {}).get(point)))
    return found


def table(records: dict[str, dict[str, Any]], times: dict[str, dict[str, float]], language: str = "en") -> str:
    """Markdown."""
    lines = [HEADS[language], "|---|---|---|---|---|---|---|---|"]
    for name, point, f, ms in rows(records, times):
        speed = "" if ms is None else f"{ms:.2f}"
        mark = "**" if (name, point) in front(records) else ""
        words = f"{mark}{title(name, language)}{mark}"
        lines.append(
            f"| {words} | {point} | {f['kl_mean']:.5f} ± {f['kl_pm']:.5f} | {f['kl_p99']:.3f} | "
            f"{100 * f['top1']:.1f} % | {f['perplexity']:.1f} | {f['bytes'] / 1e6:.2f} | {speed} |"
        )
    return "\n".join(lines)


def front(records: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """(way, point) that no other beats in both KL and bytes, the largest first."""
    points = sorted((f["bytes"], f["kl_mean"], name, point) for name, point, f, _ in rows(records, {}))
    out: list[tuple[str, str]] = []
    least = math.inf
    for _, kl, name, point in points:
        if kl < least:
            least = kl
            out.append((name, point))
    return out[::-1]


def draw(records: dict[str, dict[str, Any]], heading: str) -> str:
    """KL (log) over megabytes that a step reads."""
    found = [(f["bytes"] / 1e6, max(f["kl_mean"], 1e-5), name, point) for name, point, f, _ in rows(records, {})]
    first, last = (edge(x for x, *_ in found) for edge in (min, max))
    first, last = first - 0.05 * (last - first) - 1e-6, last + 0.05 * (last - first) + 1e-6
    low, high = (
        math.floor(math.log10(min(y for _, y, *_ in found))),
        math.ceil(math.log10(max(y for _, y, *_ in found))),
    )
    across = lambda x: LEFT + (x - first) / (last - first) * (WIDTH - LEFT - RIGHT)  # noqa: E731
    down = lambda y: TOP + (high - math.log10(y)) / max(high - low, 1) * (HEIGHT - TOP - BOTTOM)  # noqa: E731
    parts: list[str] = []
    for power in range(low, high + 1):
        y = down(10.0**power)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="small" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    for step in range(6):
        x = first + (last - first) * step / 5
        parts.append(
            f'<text class="small" x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:.2f}</text>'
        )
    best = front(records)
    places = {(name, point): (across(x), down(y)) for x, y, name, point in found}
    path = " ".join(f"{places[key][0]:.1f},{places[key][1]:.1f}" for key in best)
    parts.append(f'<polyline class="front" points="{path}"/>')
    for key, (x, y) in places.items():
        kind = "on" if key in best else "off"
        name = f"{title(key[0], 'en')} ({key[1]})"
        parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(name)}</title></circle>')
        if key in best:
            parts.append(f'<text class="small" x="{x + 6:.1f}" y="{y - 6:.1f}">{escape(title(key[0], "en"))}</text>')
    bottom = HEIGHT - BOTTOM
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img"><title>{escape(heading)}</title><style>{STYLE}</style>'
        f'<text x="{LEFT}" y="18">{escape(heading)}</text>'
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>{"".join(parts)}'
        f'<text class="small" x="{WIDTH / 2:.0f}" y="{HEIGHT - 10}" text-anchor="middle">megabytes of weights a step '
        "reads; up: KL from the original, nats a token (log)</text></svg>\n"
    )

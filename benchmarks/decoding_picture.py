"""Draws docs/images/decoding.svg: how much faster a student decodes than its teacher, by the length of the text.

    python benchmarks/decoding_picture.py

The numbers are the rows `decode | 1 × N` of benchmarks/results/serving_h200.md, so the picture is made anew from them.
Colours are readable on white and on dark pages; there is no background.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PICTURE = ROOT / "benchmarks/results/serving_h200.md", ROOT / "docs/images/decoding.svg"
COLOURS = {"SmolLM2-135M": "#1a9c87", "Qwen3-1.7B's shape": "#8f6bd6"}
GREY = "#7b8490"
WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 440, 40, 214
MOST = 32


def ratios(page: str) -> dict[str, list[tuple[int, float]]]:
    """Model → [(tokens of the text, student's tokens/s over the teacher's)], of one row of decoding."""
    found: dict[str, list[tuple[int, float]]] = {}
    for section in page.partition("\n## Before")[0].split("\n## ")[1:]:
        rows = re.findall(r"^\| decode \| 1 × ([\d,]+) \|[^|]*\|[^|]*\| ([\d.]+) \|", section, re.MULTILINE)
        found[section.splitlines()[0]] = [(int(tokens.replace(",", "")), float(ratio)) for tokens, ratio in rows]
    return found


def draw(lines: dict[str, list[tuple[int, float]]]) -> str:
    """The picture, as SVG."""
    lengths = sorted({tokens for points in lines.values() for tokens, _ in points})
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="13" role="img">',
        "<title>Decoding speed of a pure student over its teacher, by length of the text, on one H200</title>",
        _text(LEFT - 40, 20, "decoding speed, student over teacher (one row, one H200)", GREY),
    ]
    for ratio in (1, 2, 4, 8, 16, 32):
        dash = "" if ratio == 1 else ' stroke-dasharray="2 4"'
        parts.append(f'<path d="M{LEFT} {_y(ratio)}H{RIGHT}" stroke="{GREY}" stroke-opacity=".55"{dash}/>')
        parts.append(_text(LEFT - 8, _y(ratio) + 4, f"{ratio} ×", GREY, "end"))
    for tokens in lengths:
        parts.append(_text(_x(tokens, lengths), BOTTOM + 20, f"{tokens:,}", GREY, "middle"))
    parts.append(_text((LEFT + RIGHT) / 2, BOTTOM + 40, "tokens read before", GREY, "middle"))
    for name, points in lines.items():
        places = [(_x(tokens, lengths), _y(ratio)) for tokens, ratio in points]
        path = " ".join(f"{x},{y}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[name]}" stroke-width="2.5"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="4" fill="{COLOURS[name]}"/>' for x, y in places]
        x, y = places[-1]
        parts.append(_text(x + 10, y + 4, f"{name}, {points[-1][1]:.3g} ×", COLOURS[name]))
    return "\n".join([*parts, "</svg>", ""])


def _x(tokens: int, lengths: list[int]) -> float:
    share = math.log(tokens / lengths[0]) / math.log(lengths[-1] / lengths[0])
    return round(LEFT + 20 + share * (RIGHT - LEFT - 40), 1)


def _y(ratio: float) -> float:
    return round(BOTTOM - math.log(ratio) / math.log(MOST) * (BOTTOM - TOP), 1)


def _text(x: float, y: float, words: str, colour: str, anchor: str = "start") -> str:
    return f'<text x="{round(x, 1)}" y="{round(y, 1)}" fill="{colour}" text-anchor="{anchor}">{words}</text>'


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(draw(ratios(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")

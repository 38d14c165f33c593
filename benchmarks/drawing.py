"""Draw small SVG charts for RESULTS.md without any library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 360, 64, 48, 32, 170
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")

Line = Sequence[tuple[float, float]]


def lines(path: Path, title: str, x: str, y: str, series: Mapping[str, Line], dots: bool = False) -> None:
    """Draw each series as a line, or as dots only, with a legend on the right."""
    xs = [point[0] for line in series.values() for point in line]
    ys = [point[1] for line in series.values() for point in line]
    low_x, high_x, low_y, high_y = min(xs), max(xs), min(ys), max(ys)
    span_x, span_y = (high_x - low_x) or 1.0, (high_y - low_y) or 1.0

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across = LEFT + (point[0] - low_x) / span_x * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (point[1] - low_y) / span_y * (HEIGHT - BOTTOM - TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-weight="bold">{escape(title)}</text>',
    ]
    for i in range(5):
        at_x, at_y = low_x + span_x * i / 4, low_y + span_y * i / 4
        across, _ = place((at_x, low_y))
        _, down = place((low_x, at_y))
        grid = 'stroke="#ddd"'
        parts.append(
            f'<path d="M{across:.0f} {TOP}V{HEIGHT - BOTTOM}M{LEFT} {down:.0f}H{WIDTH - RIGHT}" {grid}/>'
        )
        parts.append(
            f'<text x="{across:.0f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{at_x:.3g}</text>'
        )
        parts.append(f'<text x="{LEFT - 6}" y="{down + 4:.0f}" text-anchor="end">{at_y:.3g}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) // 2}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x)}</text>'
    )
    middle = (TOP + HEIGHT - BOTTOM) // 2
    parts.append(
        f'<text x="14" y="{middle}" text-anchor="middle" '
        f'transform="rotate(-90 14 {middle})">{escape(y)}</text>'
    )
    for number, (name, line) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [place(point) for point in line]
        if not dots:
            track = " ".join(f"{across:.1f},{down:.1f}" for across, down in places)
            parts.append(f'<polyline points="{track}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{across:.1f}" cy="{down:.1f}" r="3" fill="{colour}"/>' for across, down in places
        ]
        height = TOP + 8 + 18 * number
        parts.append(
            f'<rect x="{WIDTH - RIGHT + 12}" y="{height - 9}" width="10" height="10" fill="{colour}"/>'
        )
        parts.append(f'<text x="{WIDTH - RIGHT + 28}" y="{height}">{escape(name)}</text>')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def savings(
    path: Path,
    points: Mapping[str, tuple[float, float, float]],
    goals: Sequence[tuple[float, float]],
    title: str,
) -> None:
    """Draw rise of perplexity (y, percent) against reduction of bytes (x), both axes logarithmic.

    A point is (reduction, percent of the filled mark, percent of the hollow mark); a goal is (reduction,
    percent).
    """
    width, height, left, bottom, least = 640, 320, 60, 40, 0.01
    right = math.log2(max(less for less, _, _ in points.values()) * 1.3)
    low, high = math.log10(least), math.log10(max(20.0, *(max(rises) for _, *rises in points.values())))

    def place(less: float, rise: float) -> tuple[float, float]:
        x = left + (width - left - 20) * math.log2(less) / right
        y = height - bottom - (height - bottom - 20) * (math.log10(max(rise, least)) - low) / (high - low)
        return x, y

    marks = []
    for less in (1, 2, 4, 8, 16):
        x, _ = place(less, 1)
        marks.append(f'<text x="{x:.0f}" y="{height - 22}" text-anchor="middle">{less}x</text>')
    for rise in (0.01, 0.1, 1, 10):
        _, y = place(1, rise)
        marks.append(f'<text x="{left - 8}" y="{y + 4:.0f}" text-anchor="end">{rise:g}</text>')
        marks.append(f'<line x1="{left}" x2="{width - 20}" y1="{y:.0f}" y2="{y:.0f}" stroke="#ddd"/>')
    for less, allowed in goals:
        x, y = place(less, allowed)
        marks.append(f'<path d="M{x - 6:.0f} {y:.0f}h12m-6 -6v12" stroke="#c33" fill="none"/>')
    for number, (name, (less, full, hollow)) in enumerate(points.items()):
        x, full_y = place(less, full)
        _, hollow_y = place(less, hollow)
        marks.append(f'<path d="M{x:.0f} {full_y:.0f}V{hollow_y:.0f}" stroke="#26a"/>')
        marks.append(f'<circle cx="{x:.0f}" cy="{full_y:.0f}" r="4" fill="#26a"/>')
        marks.append(f'<circle cx="{x:.0f}" cy="{hollow_y:.0f}" r="4" fill="white" stroke="#26a"/>')
        anchor = ("middle", "end", "middle", "start")[number % 4]  # neighbours' names apart
        y = hollow_y - 8 if number % 2 else full_y + 16
        marks.append(f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{escape(name)}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"'
    titles = (
        f'<text x="{left}" y="14">{escape(title)}</text>'
        f'<text x="{width - 20}" y="{height - 4}" text-anchor="end">times fewer bytes than fp32</text>'
    )
    path.write_text(f'{head} font-size="11">{titles}{"".join(marks)}</svg>\n', encoding="utf-8")

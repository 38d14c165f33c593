"""Small line charts for RESULTS.md, as SVG without any library: a few kilobytes each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 360, 64, 48, 32, 170
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")

Line = Sequence[tuple[float, float]]


def lines(path: Path, title: str, x: str, y: str, series: Mapping[str, Line], dots: bool = False) -> None:
    """Draw each series as a line (or as dots alone) over common axes, with a legend at the right."""
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

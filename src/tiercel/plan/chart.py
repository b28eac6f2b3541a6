"""Small pictures without a library: SVG lines and bars for pages and files, bars of characters for a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

COLOURS = ("#1f6f8b", "#c8553d", "#6a994e", "#8e6c8a", "#b08900", "#4a4e69")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 340, 70, 20, 34, 46

Points = Sequence[tuple[float, float]]


def lines(
    title: str,
    series: Mapping[str, Points],
    *,
    x: str,
    y: str,
    limit: tuple[str, float] | None = None,
    label_x: Callable[[float], str] = str,
    label_y: Callable[[float], str] = str,
) -> str:
    """One SVG: lines over x in powers of two, y from 0.  limit: a dashed line across, with its name."""
    xs = sorted({px for points in series.values() for px, _ in points})
    ys = [py for points in series.values() for _, py in points] + ([limit[1]] if limit else [])
    low, high = math.log2(xs[0]), math.log2(xs[-1])
    top = _round_up(max(ys, default=1.0))

    def at(px: float, py: float) -> tuple[float, float]:
        across = 0.5 if high == low else (math.log2(px) - low) / (high - low)
        return (LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - py / top * (HEIGHT - TOP - BOTTOM))

    parts = [_text(WIDTH / 2, 18, title, "middle", 15), _text(WIDTH / 2, HEIGHT - 8, x, "middle"), _text(8, TOP - 8, y)]
    for i in range(5):
        py = at(xs[0], top * i / 4)[1]
        parts.append(f'<path d="M{LEFT} {py:.1f}H{WIDTH - RIGHT}" stroke="#8884" fill="none"/>')
        parts.append(_text(LEFT - 6, py + 4, label_y(top * i / 4), "end"))
    for px in xs:
        parts.append(_text(at(px, 0)[0], HEIGHT - BOTTOM + 16, label_x(px), "middle"))
    if limit:
        py = at(xs[0], limit[1])[1]
        parts.append(f'<path d="M{LEFT} {py:.1f}H{WIDTH - RIGHT}" stroke="#d00" stroke-dasharray="6 4" fill="none"/>')
        parts.append(_text(WIDTH - RIGHT, py - 5, limit[0], "end"))
    for number, (name, points) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (at(*point) for point in points))
        parts.append(f'<polyline points="{path}" stroke="{colour}" stroke-width="2.5" fill="none"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in (at(*p) for p in points)]
        parts.append(f'<rect x="{LEFT + 10}" y="{TOP + 4 + 18 * number}" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(LEFT + 28, TOP + 14 + 18 * number, name))
    return _svg(parts, HEIGHT)


def bars(
    title: str, groups: Mapping[str, Mapping[str, float | None]], *, label: Callable[[float], str], top: float = 0.0
) -> str:
    """One SVG: for each group a bar of each name, side by side along x; None is written as a dash.

    top: the end of the scale, where it has one (1.0 of a share).
    """
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    values = [v for group in groups.values() for v in group.values() if v is not None]
    end = top or _round_up(max(values, default=1.0))
    row, gap = 16, 14
    height = TOP + sum(gap + 14 + row * len(group) for group in groups.values()) + 10
    parts, py = [_text(10, 18, title, size=15)], float(TOP)
    for group, entries in groups.items():
        py += gap
        parts.append(_text(10, py, group))
        for name, value in entries.items():
            colour = COLOURS[names.index(name) % len(COLOURS)]
            length = 0.0 if value is None else max(value, 0.0) / end * (WIDTH - 330)
            parts.append(_text(170, py + 14, _cut(name), "end", 11))
            parts.append(f'<rect x="178" y="{py + 4:.0f}" width="{length:.1f}" height="{row - 4}" fill="{colour}"/>')
            parts.append(_text(184 + length, py + 14, "–" if value is None else label(value), size=11))
            py += row
        py += 14
    return _svg(parts, height)


def terminal(
    rows: Sequence[tuple[str, float, str]], *, width: int = 40, limit: float | None = None, block: str = "█"
) -> list[str]:
    """One line each: name, bar, words.  limit: where a `┊` stands."""
    most = max([value for _, value, _ in rows] + [limit or 0.0])
    mark = None if limit is None else min(round(limit / most * width), width - 1)
    first = max(len(name) for name, _, _ in rows)
    out = []
    for name, value, words in rows:
        bar = list((block * max(round(value / most * width), 1)).ljust(width))
        if mark is not None:
            bar[mark] = "┊" if bar[mark] == " " else "╂"
        out.append(f"{name:>{first}} {''.join(bar)} {words}")
    return out


def _cut(name: str) -> str:
    return name if len(name) <= 26 else f"…{name[-25:]}"


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 4, 5, 8 × 10^n."""
    if value <= 0:
        return 1.0
    base = 10.0 ** math.floor(math.log10(value))
    return next(step * base for step in (1, 2, 2.5, 4, 5, 8, 10) if step * base >= value * 0.999)


def _text(x: float, y: float, words: str, anchor: str = "start", size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="currentColor">'
        f"{escape(words)}</text>"
    )


def _svg(parts: Sequence[str], height: float) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'font-family="system-ui, sans-serif" color="#777">{"".join(parts)}</svg>'
    )

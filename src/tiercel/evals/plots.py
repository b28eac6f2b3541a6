"""The pictures of a report, as SVG text.  Widths in units of the picture; colours are classes of the page's style."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tiercel.evals.task import LETTERS

WIDTH, LABEL = 820, 250


def svg(height: int, body: str, label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{body}</svg>'


def score(value: float, interval: dict[str, float], baselines: Sequence[tuple[str, float]]) -> str:
    """A bar from 0 to 100 %, its interval, and where the baselines are."""
    left, right = 16, WIDTH - 40
    x = lambda share: left + share * (right - left)  # noqa: E731
    body = "".join(f'<line class="line" x1="{x(t / 4):.1f}" x2="{x(t / 4):.1f}" y1="24" y2="60"/>'
                   f'<text class="dim" x="{x(t / 4):.1f}" y="76" text-anchor="middle">{25 * t} %</text>'
                   for t in range(5))  # fmt: skip
    body += f'<rect class="mark" x="{left}" y="32" width="{max(x(value) - left, 1):.1f}" height="20" rx="3"/>'
    body += whisker(x(interval["low"]), x(interval["high"]), 42)
    for row, (name, share) in enumerate(baselines):
        body += (
            f'<line class="whisker" stroke-dasharray="3 3" x1="{x(share):.1f}" x2="{x(share):.1f}" y1="24" y2="60"/>'
        )
        anchor, dx = ("end", -5) if row == 0 else ("start", 5)
        body += f'<text class="dim" x="{x(share) + dx:.1f}" y="18" text-anchor="{anchor}">{escape(name)}</text>'
    return svg(84, body, f"score {100 * value:.1f} %")


def whisker(low: float, high: float, y: float) -> str:
    return (f'<path class="whisker" fill="none" d="M{low:.1f} {y - 6}v12m0-6H{high:.1f}m0-6v12"/>')  # fmt: skip


def bars(rows: Sequence[tuple[str, float, float, float]]) -> str:
    """(name, share, low, high) as lines, the best first."""
    left, right = LABEL, WIDTH - 60
    x = lambda share: left + share * (right - left)  # noqa: E731
    body = ""
    for number, (name, value, low, high) in enumerate(sorted(rows, key=lambda row: -row[1])):
        y = 8 + 22 * number
        shown = name if len(name) <= 36 else name[:35] + "…"
        body += f'<text x="{left - 10}" y="{y + 12}" text-anchor="end">{escape(shown)}</text>'
        body += f'<rect class="mark" x="{left}" y="{y}" width="{max(x(value) - left, 1):.1f}" height="15" rx="2"/>'
        body += whisker(x(low), x(high), y + 7.5)
        body += f'<text class="dim" x="{WIDTH - 4}" y="{y + 12}" text-anchor="end">{100 * value:.1f} %</text>'
    return svg(16 + 22 * len(rows), body, "scores by group")


def lengths(found: Sequence[tuple[int, bool]], budget: int) -> str:
    """How long outputs were, right ones under wrong ones; the last column ends at the longest."""
    longest = max(max(tokens for tokens, _ in found), 1)
    bins, top, bottom, left = 24, 14, 150, 40
    columns = [[0, 0] for _ in range(bins)]
    for tokens, right in found:
        columns[min((tokens - 1) * bins // longest, bins - 1) if tokens else 0][right] += 1
    highest = max(map(sum, columns))
    width = (WIDTH - left - 20) / bins
    body = f'<line class="line" x1="{left}" x2="{WIDTH - 20}" y1="{bottom}" y2="{bottom}"/>'
    body += f'<text class="dim" x="{left - 6}" y="{top + 8}" text-anchor="end">{highest}</text>'
    for number, (misses, hits) in enumerate(columns):
        y: float = bottom
        for count, kind in ((hits, "good"), (misses, "bad")):
            height = (bottom - top) * count / highest
            y -= height
            if count:
                body += (f'<rect class="{kind}" x="{left + number * width + 1:.1f}" y="{y:.1f}" '
                         f'width="{width - 2:.1f}" height="{height:.1f}"/>')  # fmt: skip
    body += f'<text class="dim" x="{left}" y="{bottom + 16}">1</text>'
    body += (f'<text class="dim" x="{WIDTH - 20}" y="{bottom + 16}" text-anchor="end">{longest} tokens '
             f"(budget {budget})</text>")  # fmt: skip
    body += _legend((("good", "right"), ("bad", "wrong")), bottom + 16)
    return svg(bottom + 24, body, "lengths of outputs")


def picks(found: Sequence[tuple[int, int]]) -> str:
    """How often each choice was taken, beside how often it was right: a model that always answers A shows here."""
    most = max(max(pair) for pair in found) + 1
    taken = [sum(pick == i for pick, _ in found) for i in range(most)]
    gold = [sum(right == i for _, right in found) for i in range(most)]
    top, bottom, left, highest = 20, 140, 40, max(*taken, *gold)
    width = min((WIDTH - left - 20) / most, 140)
    body = f'<line class="line" x1="{left}" x2="{WIDTH - 20}" y1="{bottom}" y2="{bottom}"/>'
    for i in range(most):
        for count, kind, shift in ((taken[i], "mark", 0.12), (gold[i], "good", 0.5)):
            height, x = (bottom - top) * count / highest, left + (i + shift) * width
            body += (f'<rect class="{kind}" x="{x:.1f}" y="{bottom - height:.1f}" width="{0.36 * width:.1f}" '
                     f'height="{height:.1f}" rx="2"/><text class="dim" x="{x + 0.18 * width:.1f}" '
                     f'y="{bottom - height - 4:.1f}" text-anchor="middle">{count}</text>')  # fmt: skip
        body += f'<text x="{left + (i + 0.5) * width:.1f}" y="{bottom + 16}" text-anchor="middle">{LETTERS[i]}</text>'
    body += _legend((("mark", "chosen"), ("good", "right")), bottom + 34)
    return svg(bottom + 42, body, "choices")


def _legend(entries: Sequence[tuple[str, str]], y: float) -> str:
    x, body = WIDTH / 2 - 80, ""
    for kind, word in entries:
        body += f'<rect class="{kind}" x="{x:.0f}" y="{y - 10}" width="11" height="11" rx="2"/>'
        body += f'<text class="dim" x="{x + 16:.0f}" y="{y}">{word}</text>'
        x += 80
    return body

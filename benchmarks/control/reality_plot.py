"""The picture of simulator_vs_reality: which share of the requests had a TTFT, and a TPOT, of how much at most, as SVG. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, MARGIN, GAP, TOP = 330, 180, 48, 60, 64
MEASURED, FITTED, FORECAST = "#1f6feb", "#d29922", "#8b949e"


@dataclass(frozen=True, slots=True)
class Panel:
    """Curves of one load, each (name, values in seconds): of the cluster, and of the simulator."""

    title: str
    unit: str
    curves: tuple[tuple[str, tuple[float, ...]], ...]


def plot(rows: Sequence[Sequence[Panel]]) -> str:
    """A row for each load; its panels beside each other."""
    num_columns = max(map(len, rows))
    width, height = MARGIN + num_columns * (WIDTH + GAP), TOP + len(rows) * (HEIGHT + GAP)
    colours = {name: colour for row in rows for panel in row for name, colour in _colours(panel)}
    parts = [_text(MARGIN, 20, "Share of the requests that had at most so much", "start")]
    for i, (name, colour) in enumerate(colours.items()):
        x = MARGIN + i * 220
        parts.append(f'<rect x="{x}" y="32" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(x + 18, 42, name, "start"))
    for i, row in enumerate(rows):
        for j, panel in enumerate(row):
            parts += _panel(panel, MARGIN + j * (WIDTH + GAP), TOP + i * (HEIGHT + GAP) + 16)
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">',
            '<rect width="100%" height="100%" fill="white"/>',
            *parts,
            "</svg>\n",
        ]
    )


def _colours(panel: Panel) -> list[tuple[str, str]]:
    return [
        (name, colour) for (name, _), colour in zip(panel.curves, (MEASURED, FITTED, FORECAST), strict=False)
    ]


def _panel(panel: Panel, left: float, top: float) -> list[str]:
    longest_s = max((value for _, values in panel.curves for value in values), default=1.0)
    parts = [
        _text(left, top - 6, panel.title, "start"),
        f'<rect x="{left}" y="{top}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#d0d7de"/>',
        _text(left, top + HEIGHT + 16, "0", "middle"),
        _text(left + WIDTH, top + HEIGHT + 16, f"{longest_s * 1e3:.0f} {panel.unit}", "end"),
        _text(left - 6, top + 10, "1", "end"),
        _text(left - 6, top + HEIGHT, "0", "end"),
    ]
    for (_, values), (_, colour) in zip(panel.curves, _colours(panel), strict=True):
        points, num = [f"{left:.1f},{top + HEIGHT:.1f}"], len(values)
        for i, value in enumerate(sorted(values)):
            x = left + value / longest_s * WIDTH
            points.append(f"{x:.1f},{top + HEIGHT * (1 - i / num):.1f}")
            points.append(f"{x:.1f},{top + HEIGHT * (1 - (i + 1) / num):.1f}")
        parts.append(
            f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
    return parts


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#24292f">{escape(text)}</text>'

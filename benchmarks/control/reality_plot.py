"""The picture of simulator_vs_reality: which share of the requests had a TTFT, and a TPOT, of how much at most, as SVG. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.plot import svg

WIDTH, HEIGHT, MARGIN, GAP, TOP = 330, 180, 48, 60, 64
MEASURED, FITTED, FORECAST = svg.BLUE, svg.AMBER, svg.GREY


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
    parts = [svg.text(MARGIN, 20, "Share of the requests that had at most so much")]
    for i, (name, colour) in enumerate(colours.items()):
        x = MARGIN + i * 220
        parts += [svg.bar(x, 32, 12, 12, colour), svg.text(x + 18, 42, name)]
    for i, row in enumerate(rows):
        for j, panel in enumerate(row):
            parts += _panel(panel, MARGIN + j * (WIDTH + GAP), TOP + i * (HEIGHT + GAP) + 16)
    return svg.document(width, height, "Measured and simulated, beside each other", parts)


def _colours(panel: Panel) -> list[tuple[str, str]]:
    return [
        (name, colour) for (name, _), colour in zip(panel.curves, (MEASURED, FITTED, FORECAST), strict=False)
    ]


def _panel(panel: Panel, left: float, top: float) -> list[str]:
    longest_s = max((value for _, values in panel.curves for value in values), default=1.0)
    parts = [
        svg.text(left, top - 6, panel.title),
        f'<rect x="{left}" y="{top}" width="{WIDTH}" height="{HEIGHT}" class="frame"/>',
        svg.text(left, top + HEIGHT + 16, "0", "middle"),
        svg.text(left + WIDTH, top + HEIGHT + 16, f"{longest_s * 1e3:.0f} {panel.unit}", "end"),
        svg.text(left - 6, top + 10, "1", "end"),
        svg.text(left - 6, top + HEIGHT, "0", "end"),
    ]
    for (_, values), (_, colour) in zip(panel.curves, _colours(panel), strict=True):
        points, num = [(left, top + HEIGHT)], len(values)
        for i, value in enumerate(sorted(values)):
            x = left + value / longest_s * WIDTH
            points += [(x, top + HEIGHT * (1 - i / num)), (x, top + HEIGHT * (1 - (i + 1) / num))]
        parts.append(svg.polyline(points, colour))
    return parts

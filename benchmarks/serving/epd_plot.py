"""The EPD benchmark's picture: TTFT of each shape under each load, as SVG. Pure."""

from collections.abc import Sequence

from benchmarks.serving.epd_load import Row
from orchestrator.plot import svg
from orchestrator.plot.svg import COLOURS

LABEL_WIDTH, BAR_WIDTH, BAR_HEIGHT, GROUP_GAP, MARGIN = 320, 460, 13, 12, 16
TOP = 56


def plot(rows: Sequence[Row]) -> str:
    """One group of bars for each load: bars are p50, the lines that go on are p90."""
    shapes = list(dict.fromkeys(row.shape for row in rows))
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row.encoder}: {row.workload}, load {row.load:.0%}", []).append(row)
    longest_ms = max(row.ttft_p90_ms for row in rows)
    parts: list[str] = []
    y = TOP
    for name, members in groups.items():
        middle = y + BAR_HEIGHT * len(members) / 2 + 4
        parts.append(svg.text(LABEL_WIDTH - 8, middle, name, "end"))
        for row in members:
            parts += _bar(row, y, longest_ms, COLOURS[shapes.index(row.shape) % len(COLOURS)])
            y += BAR_HEIGHT
        y += GROUP_GAP
    width, height = LABEL_WIDTH + BAR_WIDTH + 150, y + MARGIN
    heading = [svg.text(MARGIN, 20, "Time to first token, ms: bar p50, line to p90; right of it attainment")]
    for i, shape in enumerate(shapes):
        x = LABEL_WIDTH + i * 110
        heading += [svg.bar(x, 30, 12, 12, COLOURS[i % len(COLOURS)]), svg.text(x + 18, 40, shape)]
    return svg.document(width, height, "Time to first token of each shape", [*heading, *parts])


def _bar(row: Row, y: float, longest_ms: float, colour: str) -> list[str]:
    scale = BAR_WIDTH / longest_ms
    middle, right = y + (BAR_HEIGHT - 2) / 2, LABEL_WIDTH + row.ttft_p90_ms * scale
    text = f"{row.ttft_p50_ms:.0f} / {row.ttft_p90_ms:.0f}, {row.attainment:.0%}"
    return [
        svg.bar(LABEL_WIDTH, y, row.ttft_p50_ms * scale, BAR_HEIGHT - 2, colour),
        svg.polyline([(LABEL_WIDTH, middle), (right, middle)], colour),
        svg.text(right + 6, y + BAR_HEIGHT - 3, text),
    ]

"""The EPD benchmark's picture: TTFT of each shape under each load, as SVG. Pure."""

from collections.abc import Sequence
from html import escape

from benchmarks.serving.epd_load import Row

#: By place among the shapes. Distinct in grey too.
COLOURS = ("#1f6feb", "#d29922", "#8b949e")
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
        parts.append(_text(LABEL_WIDTH - 8, middle, name, "end"))
        for row in members:
            parts += _bar(row, y, longest_ms, COLOURS[shapes.index(row.shape) % len(COLOURS)])
            y += BAR_HEIGHT
        y += GROUP_GAP
    width, height = LABEL_WIDTH + BAR_WIDTH + 150, y + MARGIN
    heading = [
        _text(MARGIN, 20, "Time to first token, ms: bar p50, line to p90; right of it attainment", "start")
    ]
    for i, shape in enumerate(shapes):
        x = LABEL_WIDTH + i * 110
        heading.append(f'<rect x="{x}" y="30" width="12" height="12" fill="{COLOURS[i % len(COLOURS)]}"/>')
        heading.append(_text(x + 18, 40, shape, "start"))
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">',
            '<rect width="100%" height="100%" fill="white"/>',
            *heading,
            *parts,
            "</svg>\n",
        ]
    )


def _bar(row: Row, y: float, longest_ms: float, colour: str) -> list[str]:
    scale = BAR_WIDTH / longest_ms
    middle, right = y + (BAR_HEIGHT - 2) / 2, LABEL_WIDTH + row.ttft_p90_ms * scale
    text = f"{row.ttft_p50_ms:.0f} / {row.ttft_p90_ms:.0f}, {row.attainment:.0%}"
    return [
        f'<rect x="{LABEL_WIDTH}" y="{y}" width="{row.ttft_p50_ms * scale:.1f}" height="{BAR_HEIGHT - 2}" fill="{colour}"/>',
        f'<line x1="{LABEL_WIDTH}" x2="{right:.1f}" y1="{middle}" y2="{middle}" stroke="{colour}" stroke-width="2"/>',
        _text(right + 6, y + BAR_HEIGHT - 3, text, "start"),
    ]


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#24292f">{escape(text)}</text>'

"""Marks, text and whole pictures as SVG. Pure; the same input gives the same bytes.

Coordinates are pixels, y grows downwards. Ink, grid and ground follow the reader's light or dark scheme; colours of data are readable on both.
"""

from collections.abc import Iterable, Sequence
from html import escape

#: The first three are distinct in grey too.
COLOURS = (
    "#1f6feb",
    "#d29922",
    "#8b949e",
    "#2da44e",
    "#da3633",
    "#8957e5",
    "#bf3989",
    "#9a6700",
    "#1b7c83",
)
BLUE, AMBER, GREY, GREEN, RED, PURPLE, PINK, BROWN, TEAL = COLOURS
#: That of words, which follows the scheme.
INK = "currentColor"

FONT_SIZE = 12
#: At most so wide is a character on average, in pixels.
CHARACTER_WIDTH = 7.0

_STYLE = """\
<style>
svg { color: #24292f }
.ground { fill: #ffffff } .ink { fill: #24292f } .frame { fill: none; stroke: #8c959f }
.grid { stroke: #d8dee4 } .tick { stroke: #24292f }
@media (prefers-color-scheme: dark) {
svg { color: #e6edf3 }
.ground { fill: #0d1117 } .ink { fill: #e6edf3 } .frame { stroke: #6e7681 }
.grid { stroke: #30363d } .tick { stroke: #e6edf3 }
}
</style>"""


def document(width: float, height: float, title: str, parts: Iterable[str]) -> str:
    """A whole picture. title: for those who do not see it."""
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="{FONT_SIZE}">',
        f"<title>{escape(title)}</title>",
        _STYLE,
        '<rect class="ground" width="100%" height="100%"/>',
        *parts,
        "</svg>\n",
    ]
    return "\n".join(lines)


def text(x: float, y: float, words: str, anchor: str = "start") -> str:
    """One line of words; y is its base. anchor: start, middle or end."""
    return f'<text class="ink" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def bar(x: float, y: float, width: float, height: float, colour: str) -> str:
    """A filled rectangle."""
    return f'<rect x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{height:.1f}" fill="{colour}"/>'


def polyline(points: Sequence[tuple[float, float]], colour: str, *, is_dashed: bool = False) -> str:
    """Through all points in turn, 2 pixels wide."""
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashes = ' stroke-dasharray="5 4"' if is_dashed else ""
    return f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>'


def dot(x: float, y: float, colour: str) -> str:
    """A small round mark."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'


def text_width(words: str) -> float:
    """At most so many pixels does it need."""
    return len(words) * CHARACTER_WIDTH


def legend(entries: Sequence[tuple[str, str]], x: float, y: float, width: float) -> tuple[list[str], float]:
    """(name, colour) each, in as many rows as they need; returns the marks and the height of all rows. y: top."""
    parts: list[str] = []
    at_x, at_y = x, y
    for name, colour in entries:
        needed = 18 + text_width(name) + 16
        if at_x > x and at_x + needed > x + width:
            at_x, at_y = x, at_y + 18
        parts += [bar(at_x, at_y, 12, 12, colour), text(at_x + 18, at_y + 10, name)]
        at_x += needed
    return parts, (at_y + 18 - y if entries else 0.0)

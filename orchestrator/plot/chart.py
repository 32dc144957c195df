"""Charts of lines and steps, each in a frame with labelled axes. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from orchestrator.plot import svg

#: Left of a frame, for the numbers of the y axis; right of it, for half of the last number of the x axis.
LEFT, RIGHT = 64, 32
#: Above a frame, for its title; below it, for the numbers and the label of the x axis.
TITLE, BELOW = 22, 44
MAX_TICKS = 6


@dataclass(frozen=True, slots=True)
class Axis:
    """From `low` to `high`, low < high. label: what it counts, with its unit. is_log: low > 0."""

    label: str
    low: float
    high: float
    is_log: bool = False

    def share(self, value: float) -> float:
        """Where on the axis it is, 0 to 1; what is outside is at the end."""
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        return min(1.0, max(0.0, (value - low) / (high - low)))

    def ticks(self) -> list[float]:
        """Round numbers on it: 1, 2 or 5 times powers of ten, or these powers alone."""
        if self.is_log:
            lowest, highest = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            powers = [10.0**exponent for exponent in range(lowest, highest + 1)]
            found = self._on_it([factor * power for power in powers for factor in (1, 2, 5)])
            powers = self._on_it(powers)
            return found if len(found) <= MAX_TICKS else powers[:: 1 + len(powers) // MAX_TICKS]
        rough = (self.high - self.low) / MAX_TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return self._on_it([index * step for index in range(first, last + 1)])

    def _on_it(self, values: Sequence[float]) -> list[float]:
        return [value for value in values if self.low <= value <= self.high]


def axis_over(label: str, values: Sequence[float], *, is_log: bool = False, from_zero: bool = False) -> Axis:
    """An axis that all values are on, with some room. Of no values: from 0 to 1, or from 1 to 10."""
    if is_log:
        above = [value for value in values if value > 0] or [1.0, 10.0]
        return Axis(label, min(above) / 1.25, max(above) * 1.25, is_log=True)
    low, high = min(values, default=0.0), max(values, default=1.0)
    low = min(low, 0.0) if from_zero else low
    room = (high - low) * 0.05 or max(1.0, abs(high)) * 0.5
    return Axis(label, low if from_zero else low - room, high + room)


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a chart is: its upper left corner and its size, without title and numbers."""

    left: float
    top: float
    width: float
    height: float

    def x(self, axis: Axis, value: float) -> float:
        """Pixels."""
        return self.left + axis.share(value) * self.width

    def y(self, axis: Axis, value: float) -> float:
        """Pixels."""
        return self.top + (1 - axis.share(value)) * self.height


@dataclass(frozen=True, slots=True)
class Series:
    """A line through its points, by x. is_step: each value holds until the next point. has_dots: each point is marked."""

    colour: str
    points: tuple[tuple[float, float], ...]
    is_step: bool = False
    has_dots: bool = False
    is_dashed: bool = False


def chart(frame: Frame, title: str, x: Axis, y: Axis, series: Sequence[Series]) -> list[str]:
    """Frame, axes and lines. The legend is the caller's, since charts may share one."""
    parts = [*axes(frame, title, x), *_y_ticks(frame, y)]
    for one in series:
        parts += _lines(frame, x, y, one)
    return ["<g>", *parts, "</g>"]


def axes(frame: Frame, title: str, x: Axis) -> list[str]:
    """The frame with its title and the x axis."""
    bottom = frame.top + frame.height
    size = f'width="{frame.width:.1f}" height="{frame.height:.1f}"'
    parts = [
        f'<rect class="frame" x="{frame.left:.1f}" y="{frame.top:.1f}" {size}/>',
        svg.text(frame.left, frame.top - 8, title),
        svg.text(frame.left + frame.width / 2, bottom + 34, x.label, "middle"),
    ]
    free_from = 0.0
    for value in x.ticks():
        at, words = frame.x(x, value), f"{value:,g}"
        parts.append(_grid(at, frame.top, at, bottom))
        half = svg.text_width(words) / 2
        # In a narrow frame not every number has room.
        if at - half >= free_from:
            parts.append(svg.text(at, bottom + 16, words, "middle"))
            free_from = at + half + 4
    return parts


def _y_ticks(frame: Frame, y: Axis) -> list[str]:
    parts = []
    for value in y.ticks():
        at = frame.y(y, value)
        parts.append(_grid(frame.left, at, frame.left + frame.width, at))
        parts.append(svg.text(frame.left - 6, at + 4, f"{value:,g}", "end"))
    return parts


def _grid(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="grid" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _lines(frame: Frame, x: Axis, y: Axis, series: Series) -> list[str]:
    points = [(frame.x(x, at), frame.y(y, value)) for at, value in series.points]
    path = points[:1]
    for before, after in pairwise(points):
        path += [(after[0], before[1]), after] if series.is_step else [after]
    parts = [svg.polyline(path, series.colour, is_dashed=series.is_dashed)] if len(path) > 1 else []
    if series.has_dots or len(points) == 1:
        parts += [svg.dot(*point, series.colour) for point in points]
    return parts

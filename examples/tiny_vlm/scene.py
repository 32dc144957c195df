"""Pictures drawn from a seed, and what is in them.

A scene is decided first, then drawn: shapes on a plain background, or a printed word or number. Its things lie
in cells of a grid of three by three, so that each place has a name. The same seed gives the same scene.
"""

import math
import random
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from examples.tiny_vlm.words import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT_PAIRS,
    HELD_OUT_WORDS,
    MAX_COUNT,
    MAX_NUMBER,
    SHAPES,
    SIZES,
    WORDS,
)

#: Radius of a thing, as a part of the shorter side of the picture.
RADII = {"small": (0.07, 0.092), "large": (0.145, 0.175)}
#: Of a thing among many that are counted.
COUNTED_RADII = (0.07, 0.1)
#: Cells of a side of the grid in which things to count lie.
COUNT_GRID = 4
#: The longer side of what is drawn, in pixels.
CANVAS = 256
#: Colours that cannot be told from a background.
TOO_NEAR = {"white": {"white", "yellow"}, "black": {"black", "brown"}, "beige": {"white", "yellow"}}
NOISE_BANK_SIDE = 1024


class Kind(StrEnum):
    """What a picture is about."""

    ONE = "one"
    FEW = "few"
    COUNT = "count"
    WORD = "word"
    NUMBER = "number"


KIND_WEIGHTS = {Kind.ONE: 3, Kind.FEW: 5, Kind.COUNT: 4, Kind.WORD: 3, Kind.NUMBER: 2}


@dataclass(frozen=True, slots=True)
class Thing:
    """A shape. Coordinates and radius are parts of the picture's width, height and shorter side."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    #: Degrees.
    angle: float

    @property
    def cell(self) -> tuple[int, int]:
        """Row and column in the grid of three by three."""
        return min(2, int(self.y * 3)), min(2, int(self.x * 3))


@dataclass(frozen=True, slots=True)
class Scene:
    """All that a picture shows."""

    kind: Kind
    background: str
    #: In the order of rows, then columns.
    things: tuple[Thing, ...]
    #: What is printed: a word or a number in digits; empty where nothing is.
    text: str
    text_colour: str
    #: Width over height.
    aspect: float
    #: Of everything that does not matter: jitter, noise, letters.
    style_seed: int


@dataclass(frozen=True, slots=True)
class Choice:
    """What scenes may have: training pictures lack what is held out, some of evaluation have nothing else."""

    pairs_held_out: bool = False
    words_held_out: bool = False
    kinds: tuple[Kind, ...] = tuple(Kind)


TRAINING = Choice()


def draw_scene(seed: int, choice: Choice = TRAINING) -> Scene:
    """Decide what a picture shows."""
    rng = random.Random(seed)
    kind = rng.choices(choice.kinds, [KIND_WEIGHTS[kind] for kind in choice.kinds])[0]
    background = rng.choice(list(BACKGROUNDS))
    text, things = "", []
    if kind is Kind.COUNT:
        things = _things_to_count(rng, background, choice)
    elif kind in (Kind.ONE, Kind.FEW):
        things = _things(rng, background, choice, 1 if kind is Kind.ONE else rng.choice((2, 2, 2, 3)))
    elif kind is Kind.WORD:
        text = rng.choice(HELD_OUT_WORDS if choice.words_held_out else WORDS)
    else:
        text = str(rng.randint(0, 9) if rng.random() < 0.4 else rng.randint(10, MAX_NUMBER))
    return Scene(
        kind=kind,
        background=background,
        things=tuple(sorted(things, key=lambda thing: (thing.cell, thing.y))),
        text=text,
        text_colour=rng.choice(_colours(background)),
        aspect=1.0 if rng.random() < 0.5 else math.exp(rng.uniform(-0.35, 0.35)),
        style_seed=rng.getrandbits(48),
    )


def _colours(background: str) -> list[str]:
    near = TOO_NEAR.get(background, set())
    return [colour for colour in COLOURS if colour not in near]


def _pair(rng: random.Random, background: str, choice: Choice, shapes: list[str]) -> tuple[str, str]:
    """A colour and a shape of `shapes`."""
    colours = _colours(background)
    while True:
        pair = rng.choice(colours), rng.choice(shapes)
        if (pair in HELD_OUT_PAIRS) == choice.pairs_held_out:
            return pair
        if choice.pairs_held_out and not any(
            (colour, shape) in HELD_OUT_PAIRS for colour in colours for shape in shapes
        ):
            return pair


def _things(rng: random.Random, background: str, choice: Choice, count: int) -> list[Thing]:
    """Things of different shapes and colours in different cells."""
    shapes, taken, things = list(SHAPES), set[str](), []
    for place in rng.sample(range(9), count):
        colour, shape = _pair(rng, background, choice, shapes)
        while colour in taken:
            colour, shape = _pair(rng, background, replace(choice, pairs_held_out=False), shapes)
        taken.add(colour)
        shapes.remove(shape)
        size = rng.choice(SIZES)
        radius = rng.uniform(*RADII[size])
        row, col = divmod(place, 3)
        things.append(_thing(rng, (shape, colour, size), ((col + 0.5) / 3, (row + 0.5) / 3), radius, 0.05))
    return things


def _things_to_count(rng: random.Random, background: str, choice: Choice) -> list[Thing]:
    """Some things of one shape, and sometimes others of a second one."""
    shapes = list(SHAPES)
    colour, shape = _pair(rng, background, choice, shapes)
    shapes.remove(shape)
    groups = [(colour, shape, rng.randint(1, MAX_COUNT))]
    if rng.random() < 0.4:
        other_colour, other = _pair(rng, background, replace(choice, pairs_held_out=False), shapes)
        groups.append((other_colour, other, rng.randint(1, 3)))
    kinds = [(shape, colour) for colour, shape, count in groups for _ in range(count)][: MAX_COUNT + 2]
    things = []
    for (shape, colour), cell in zip(kinds, rng.sample(range(COUNT_GRID**2), len(kinds)), strict=True):
        row, col = divmod(cell, COUNT_GRID)
        centre = (col + 0.5) / COUNT_GRID, (row + 0.5) / COUNT_GRID
        radius = rng.uniform(*COUNTED_RADII)
        things.append(_thing(rng, (shape, colour, "small"), centre, radius, 0.02))
    return things


def _thing(
    rng: random.Random, look: tuple[str, str, str], centre: tuple[float, float], radius: float, jitter: float
) -> Thing:
    def place(coordinate: float) -> float:
        moved = coordinate + rng.uniform(-jitter, jitter)
        return min(max(moved, radius + 0.01), 0.99 - radius)

    shape, colour, size = look
    x, y = place(centre[0]), place(centre[1])
    return Thing(shape, colour, size, x, y, radius, rng.uniform(-12, 12))


def paint(scene: Scene) -> Image.Image:
    """The picture, RGB; its longer side is CANVAS pixels."""
    rng = random.Random(scene.style_seed)
    width = CANVAS if scene.aspect >= 1 else round(CANVAS * scene.aspect)
    height = CANVAS if scene.aspect <= 1 else round(CANVAS / scene.aspect)
    image = Image.new("RGB", (width, height), _jittered(rng, BACKGROUNDS[scene.background], 6))
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        _draw_thing(draw, thing, (width, height), _jittered(rng, COLOURS[thing.colour], 10))
    if scene.text:
        _draw_text(draw, scene, (width, height), rng)
    if rng.random() < 0.15:
        image = image.filter(ImageFilter.BoxBlur(rng.uniform(0.5, 1.5)))
    return image


def with_noise(pixels: NDArray[np.uint8], scene: Scene) -> NDArray[np.uint8]:
    """Mild noise on half of all pictures. pixels: [height, width, 3]."""
    rng = random.Random(scene.style_seed + 1)
    if rng.random() < 0.5:
        return pixels
    height, width, _ = pixels.shape
    top, left = rng.randrange(NOISE_BANK_SIDE - height), rng.randrange(NOISE_BANK_SIDE - width)
    noise = _noise_bank()[rng.randrange(3), top : top + height, left : left + width]
    return np.clip(pixels.astype(np.int16) + noise, 0, 255).astype(np.uint8)


@cache
def _noise_bank() -> NDArray[np.int16]:
    """Noise of three strengths, [3, side, side, 3]."""
    normal = np.random.default_rng(0).standard_normal((3, NOISE_BANK_SIDE, NOISE_BANK_SIDE, 3), np.float32)
    return (normal * np.array([3, 6, 10], np.float32)[:, None, None, None]).astype(np.int16)


def _jittered(rng: random.Random, colour: tuple[int, int, int], most: int) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, channel + rng.randint(-most, most))) for channel in colour)
    return red, green, blue


def _draw_thing(
    draw: ImageDraw.ImageDraw, thing: Thing, size: tuple[int, int], fill: tuple[int, int, int]
) -> None:
    radius = thing.radius * min(size)
    x, y = thing.x * size[0], thing.y * size[1]
    if thing.shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        return
    turn = math.radians(thing.angle)
    cos, sin = math.cos(turn) * radius, math.sin(turn) * radius
    points = [(x + cos * px - sin * py, y + sin * px + cos * py) for px, py in outline(thing.shape)]
    draw.polygon(points, fill=fill)


@cache
def outline(shape: str) -> tuple[tuple[float, float], ...]:
    """Corners of a shape with radius 1 around the origin; y points down."""
    if shape == "square":
        return ((-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82))
    if shape == "triangle":
        return ((0.0, -0.95), (0.95, 0.75), (-0.95, 0.75))
    if shape == "diamond":
        return ((0.0, -1.0), (0.68, 0.0), (0.0, 1.0), (-0.68, 0.0))
    if shape == "cross":
        a, b = 0.32, 0.95
        return (
            (-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)
        )  # fmt: skip
    if shape == "star":
        spokes = [(1.05 if i % 2 == 0 else 0.42, math.pi * i / 5) for i in range(10)]
        return tuple((r * math.sin(t), -r * math.cos(t)) for r, t in spokes)
    if shape == "heart":
        turns = [2 * math.pi * i / 32 for i in range(32)]
        return tuple(
            (
                math.sin(t) ** 3,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16.5,
            )
            for t in turns
        )
    assert shape == "moon", shape
    outer = [math.radians(50 + 260 * i / 24) for i in range(25)]
    inner = [math.radians(290 - 220 * i / 20) for i in range(21)]
    horn = math.cos(math.radians(50)), math.sin(math.radians(50))
    # The inner arc ends where the outer one does.
    reach = horn[1] / math.sin(math.radians(70))
    middle = horn[0] - reach * math.cos(math.radians(70))
    return tuple((math.cos(t) + 0.2, math.sin(t)) for t in outer) + tuple(
        (middle + reach * math.cos(t) + 0.2, reach * math.sin(t)) for t in inner
    )


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _draw_text(draw: ImageDraw.ImageDraw, scene: Scene, size: tuple[int, int], rng: random.Random) -> None:
    """The text, somewhere where it fits, in small or capital letters."""
    text = scene.text.upper() if rng.random() < 0.4 else scene.text
    font_size = rng.randrange(44, 100, 4)
    while font_size > 28:
        left, top, right, bottom = draw.textbbox((0, 0), text, font=_font(font_size))
        if right - left < 0.92 * size[0] and bottom - top < 0.92 * size[1]:
            break
        font_size -= 4
    x = rng.uniform(0.03 * size[0], 0.97 * size[0] - (right - left)) - left
    y = rng.uniform(0.03 * size[1], 0.97 * size[1] - (bottom - top)) - top
    draw.text((x, y), text, font=_font(font_size), fill=_jittered(rng, COLOURS[scene.text_colour], 10))

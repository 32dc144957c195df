"""Questions about scenes, with their answers. Pure.

Every answer is one sentence that the question and the pictures determine, so that it can be compared exactly.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from examples.tiny_vlm.scene import Kind, Scene, Thing
from examples.tiny_vlm.words import BACKGROUNDS, COLOURS, MAX_COUNT, NUMBERS, PLACES, SHAPES, SIZES, WORDS

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")


class Topic(StrEnum):
    """What a question asks for."""

    COLOUR = "colour"
    SHAPE = "shape"
    POSITION = "position"
    COUNT = "count"
    SIZE = "size"
    WORD = "word"
    NUMBER = "number"
    RELATION = "relation"
    CAPTION = "caption"
    YES_NO = "yes/no"
    BACKGROUND = "background"
    WHICH_PICTURE = "which picture"
    NTH_PICTURE = "nth picture"


#: How much more often a topic is asked than another that fits the same picture.
WEIGHTS = {
    Topic.COLOUR: 1.5,
    Topic.SHAPE: 1.5,
    Topic.POSITION: 2.0,
    Topic.COUNT: 3.0,
    Topic.BACKGROUND: 0.4,
    Topic.RELATION: 0.6,
}


@dataclass(frozen=True, slots=True)
class Question:
    """A question and its one right answer."""

    topic: Topic
    text: str
    answer: str


def ask(scenes: Sequence[Scene], rng: random.Random, count: int) -> list[Question]:
    """`count` questions about these pictures, of random topics among those that fit."""
    if len(scenes) == 1:
        makers = [make for make in _MAKERS if make.fits(scenes[0])]
        weights = [WEIGHTS.get(make.topic, 1.0) for make in makers]
        chosen = rng.choices(makers, weights, k=count)
        return [Question(make.topic, *make.make(scenes[0], rng)) for make in chosen]
    questions = []
    for _ in range(count):
        which = _which_picture(scenes, rng) if rng.random() < 0.4 else None
        questions.append(which or _nth_picture(scenes, rng))
    return questions


def normalised(answer: str) -> str:
    """Words in small letters alone: what counts when answers are compared."""
    return " ".join(re.findall(r"[a-z0-9]+", answer.lower().replace("color", "colour")))


def caption(scene: Scene) -> str:
    """What the picture shows, without a full stop."""
    if scene.kind is Kind.WORD:
        return f"the word {scene.text}"
    if scene.kind is Kind.NUMBER:
        return f"the number {scene.text}"
    if scene.kind is Kind.COUNT:
        return " and ".join(_counted(count, shape) for shape, count in _counts(scene).items())
    return " and ".join(f"{article(thing.colour)} {thing.shape} {where(thing)}" for thing in scene.things)


def article(word: str) -> str:
    """The word after "a" or "an"."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def where(thing: Thing) -> str:
    """Place of a thing, as the end of a sentence."""
    row, col = thing.cell
    return f"{'in' if (row, col) == (1, 1) else 'at'} the {PLACES[row][col]}"


def _counts(scene: Scene) -> dict[str, int]:
    """Things of each shape, shapes in the order of SHAPES."""
    counts = {shape: sum(thing.shape == shape for thing in scene.things) for shape in SHAPES}
    return {shape: count for shape, count in counts.items() if count}


def _counted(count: int, noun: str) -> str:
    plural = noun if count == 1 else f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{NUMBERS[count]} {plural}"


def _colour(scene: Scene, rng: random.Random) -> tuple[str, str]:
    if scene.text:
        noun = "word" if scene.kind is Kind.WORD else "number"
        return rng.choice(
            (f"What colour is the {noun}?", f"What color is the {noun}?", f"Which colour is the {noun}?")
        ), f"The {noun} is {scene.text_colour}."
    thing = rng.choice(scene.things)
    noun = f"{thing.shape}s" if _counts(scene)[thing.shape] > 1 else thing.shape
    noun = noun.replace("crosss", "crosses")
    verb = "is" if noun == thing.shape else "are"
    text = rng.choice(
        (
            f"What colour {verb} the {noun}?",
            f"What color {verb} the {noun}?",
            f"Which colour {verb} the {noun}?",
            f"Tell me the colour of the {noun}.",
            f"What is the color of the {noun}?",
        )
    )
    return text, f"The {noun} {verb} {thing.colour}."


def _shape(scene: Scene, rng: random.Random) -> tuple[str, str]:
    thing = rng.choice(scene.things)
    if len(scene.things) == 1 and rng.random() < 0.5:
        text = rng.choice(("What shape is this?", "Which shape is in the picture?", "What shape do you see?"))
        return text, f"It is {article(thing.shape)}."
    text = rng.choice(
        (
            f"What shape is the {thing.colour} thing?",
            f"Which shape is {thing.colour}?",
            f"What is the {thing.colour} shape?",
        )
    )
    return text, f"The {thing.colour} shape is {article(thing.shape)}."


def _position(scene: Scene, rng: random.Random) -> tuple[str, str]:
    thing = rng.choice(scene.things)
    noun = thing.shape if rng.random() < 0.7 else f"{thing.colour} {thing.shape}"
    text = rng.choice(
        (
            f"Where is the {noun}?",
            f"Where do you see the {noun}?",
            f"Where in the picture is the {noun}?",
            f"What is the position of the {noun}?",
        )
    )
    return text, f"The {noun} is {where(thing)}."


def _count(scene: Scene, rng: random.Random) -> tuple[str, str]:
    counts = _counts(scene)
    if len(scene.things) <= MAX_COUNT and rng.random() < 0.3:
        noun, count = "shape", len(scene.things)
    else:
        noun = rng.choice(list(counts))
        count = counts[noun]
    plural = _counted(2, noun).removeprefix("two ")
    text = rng.choice(
        (
            f"How many {plural} are there?",
            f"How many {plural} do you see?",
            f"How many {plural} are in the picture?",
            f"Count the {plural}.",
        )
    )
    return text, f"There {'is' if count == 1 else 'are'} {_counted(count, noun)}."


def _size(scene: Scene, rng: random.Random) -> tuple[str, str]:
    thing = rng.choice(scene.things)
    text = rng.choice(
        (
            f"Is the {thing.shape} small or large?",
            f"What size is the {thing.shape}?",
            f"Is the {thing.shape} large or small?",
        )
    )
    return text, f"The {thing.shape} is {thing.size}."


def _word(scene: Scene, rng: random.Random) -> tuple[str, str]:
    text = rng.choice(
        (
            "What word is written?",
            "What does it say?",
            "Read the word.",
            "Which word is in the picture?",
            "What is written here?",
        )
    )
    return text, f"The word is {scene.text}."


def _number(scene: Scene, rng: random.Random) -> tuple[str, str]:
    text = rng.choice(("What number is written?", "Which number is in the picture?", "Read the number."))
    return text, f"The number is {scene.text}."


def _relation(scene: Scene, rng: random.Random) -> tuple[str, str]:
    one, other = rng.sample(scene.things, 2)
    (row, col), (other_row, other_col) = one.cell, other.cell
    pairs = []
    if col != other_col:
        pairs.append(("left of", "right of", col < other_col))
    if row != other_row:
        pairs.append(("above", "below", row < other_row))
    first, second, is_first = rng.choice(pairs)
    asked = rng.sample((first, second), 2)
    text = f"Is the {one.shape} {asked[0]} or {asked[1]} the {other.shape}?"
    return text, f"The {one.shape} is {first if is_first else second} the {other.shape}."


def _caption(scene: Scene, rng: random.Random) -> tuple[str, str]:
    text = rng.choice(
        (
            "What is in this picture?",
            "What is in the picture?",
            "What is in this image?",
            "What's in this picture?",
            "Describe the picture.",
            "Describe this image.",
            "What do you see?",
            "What can you see in this picture?",
            "What does the picture show?",
            "What is this?",
        )
    )
    return text, f"The picture shows {caption(scene)}."


def _yes_no(scene: Scene, rng: random.Random) -> tuple[str, str]:
    is_true = rng.random() < 0.5
    if scene.text:
        noun, colours = "word" if scene.kind is Kind.WORD else "number", COLOURS
        said = scene.text_colour if is_true else _another(rng, colours, scene.text_colour)
        answer = f"{'Yes' if is_true else 'No'}, the {noun} is {scene.text_colour}."
        return f"Is the {noun} {said}?", answer
    shapes = list(_counts(scene))
    if rng.random() < 0.5:
        shape = rng.choice(shapes if is_true else [shape for shape in SHAPES if shape not in shapes])
        text = rng.choice((f"Is there a {shape}?", f"Do you see a {shape}?"))
        return text, f"Yes, there is a {shape}." if is_true else f"No, there is no {shape}."
    thing = rng.choice(scene.things)
    said = thing.colour if is_true else _another(rng, COLOURS, thing.colour)
    text = f"Is there a {said} {thing.shape}?".replace("a orange", "an orange")
    return text, f"{'Yes' if is_true else 'No'}, the {thing.shape} is {thing.colour}."


def _another(rng: random.Random, choices: Sequence[str] | dict[str, object], one: str) -> str:
    return rng.choice([choice for choice in choices if choice != one])


def _background(scene: Scene, rng: random.Random) -> tuple[str, str]:
    text = rng.choice(("What colour is the background?", "What color is the background?"))
    return text, f"The background is {scene.background}."


@dataclass(frozen=True, slots=True)
class _Maker:
    topic: Topic
    fits: Callable[[Scene], bool]
    make: Callable[[Scene, random.Random], tuple[str, str]]


_OBJECTS = (Kind.ONE, Kind.FEW)
_MAKERS = (
    _Maker(Topic.COLOUR, lambda scene: True, _colour),
    _Maker(Topic.SHAPE, lambda scene: scene.kind in _OBJECTS, _shape),
    _Maker(Topic.POSITION, lambda scene: scene.kind in _OBJECTS, _position),
    _Maker(Topic.COUNT, lambda scene: scene.kind in (Kind.FEW, Kind.COUNT), _count),
    _Maker(Topic.SIZE, lambda scene: scene.kind in _OBJECTS, _size),
    _Maker(Topic.WORD, lambda scene: scene.kind is Kind.WORD, _word),
    _Maker(Topic.NUMBER, lambda scene: scene.kind is Kind.NUMBER, _number),
    _Maker(Topic.RELATION, lambda scene: scene.kind is Kind.FEW, _relation),
    _Maker(Topic.CAPTION, lambda scene: True, _caption),
    _Maker(Topic.YES_NO, lambda scene: True, _yes_no),
    _Maker(Topic.BACKGROUND, lambda scene: True, _background),
)


def _named(nth: int, rng: random.Random) -> tuple[str, str]:
    """How picture `nth`, from 0, is called within a sentence, and at its beginning."""
    if rng.random() < 0.3:
        return f"picture {nth + 1}", f"Picture {nth + 1}"
    return f"the {ORDINALS[nth]} picture", f"The {ORDINALS[nth]} picture"


def _nth_picture(scenes: Sequence[Scene], rng: random.Random) -> Question:
    nth = rng.randrange(len(scenes))
    name, begin = _named(nth, rng)
    text = rng.choice((f"What is in {name}?", f"Describe {name}.", f"What does {name} show?"))
    return Question(Topic.NTH_PICTURE, text, f"{begin} shows {caption(scenes[nth])}.")


def _which_picture(scenes: Sequence[Scene], rng: random.Random) -> Question | None:
    """None when nothing sets one picture apart."""
    nth = rng.randrange(len(scenes))
    scene, others = scenes[nth], [scene for i, scene in enumerate(scenes) if i != nth]
    if scene.text:
        if any(other.text == scene.text for other in others):
            return None
        noun = f"the {'word' if scene.kind is Kind.WORD else 'number'} {scene.text}"
    else:
        shape = rng.choice([thing.shape for thing in scene.things])
        if any(shape in _counts(other) for other in others):
            return None
        is_one = _counts(scene)[shape] == 1
        noun = article(shape) if is_one else f"the {_counted(2, shape).removeprefix('two ')}"
    text = rng.choice((f"Which picture shows {noun}?", f"In which picture do you see {noun}?"))
    return Question(Topic.WHICH_PICTURE, text, f"The {ORDINALS[nth]} picture shows {noun}.")


def facts(scene: Scene) -> str:
    """What the picture shows in sentences that the language model finds answers in by itself.

    Each begins as the answer to a question does, so what is asked for stands behind what is already said.
    """
    if scene.text:
        noun = "word" if scene.kind is Kind.WORD else "number"
        told = [f"The {noun} is {scene.text}", f"The {noun} is {scene.text_colour}"]
    elif scene.kind is Kind.COUNT:
        told = []
        for shape, count in _counts(scene).items():
            colour = next(thing.colour for thing in scene.things if thing.shape == shape)
            noun = shape if count == 1 else _counted(2, shape).removeprefix("two ")
            verb = "is" if count == 1 else "are"
            told += [f"There {verb} {_counted(count, shape)}", f"The {noun} {verb} {colour}"]
        if len(scene.things) <= MAX_COUNT:
            told.append(_number_of_shapes(scene))
    else:
        told = [_number_of_shapes(scene)]
        for thing in scene.things:
            told += [
                f"The {thing.shape} is {thing.colour}",
                f"The {thing.colour} shape is {article(thing.shape)}",
                f"The {thing.shape} is {where(thing)}",
                f"The {thing.shape} is {thing.size}",
            ]
    told.append(f"The background is {scene.background}")
    # Three things leave no room for more than the words.
    return (
        " ".join(told)
        if len(scene.things) == 3 and scene.kind is Kind.FEW
        else " ".join(f"{one}." for one in told)
    )


def _number_of_shapes(scene: Scene) -> str:
    count = len(scene.things)
    return f"There {'is' if count == 1 else 'are'} {_counted(count, 'shape')}"


#: For the auxiliary loss of the training: see `attributes`.
NUM_CLASSES = (
    *(count for _ in SHAPES for count in (MAX_COUNT + 1, len(COLOURS), 9, len(SIZES))),
    len(BACKGROUNDS),
    len(COLOURS),
    len(WORDS),
    11,
    10,
)


def attributes(scene: Scene) -> list[int]:
    """What a picture shows, as one class for each of NUM_CLASSES; -1 where there is none.

    For each shape its count and, of one that is there once, its colour, place and size; then the background, the
    colour of the text, the word, and the number's tens (10: none) and ones.
    """
    counts, classes = _counts(scene), list[int]()
    colours, backgrounds = list(COLOURS), list(BACKGROUNDS)
    for shape in SHAPES:
        classes.append(min(counts.get(shape, 0), MAX_COUNT))
        things = [thing for thing in scene.things if thing.shape == shape]
        if not things:
            classes += [-1, -1, -1]
            continue
        row, col = things[0].cell
        is_alone = len(things) == 1 and scene.kind is not Kind.COUNT
        classes.append(colours.index(things[0].colour))
        classes += [row * 3 + col, SIZES.index(things[0].size)] if is_alone else [-1, -1]
    classes.append(backgrounds.index(scene.background))
    classes.append(colours.index(scene.text_colour) if scene.text else -1)
    classes.append(WORDS.index(scene.text) if scene.text in WORDS else -1)
    if scene.kind is not Kind.NUMBER:
        return [*classes, -1, -1]
    tens, ones = scene.text[:-1], int(scene.text[-1])
    return [*classes, int(tens) if tens else 10, ones]

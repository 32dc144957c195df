"""Writes pictures with known answers, for the documentation and tests.

python -m examples.tiny_vlm.pictures --out examples/images
"""

import argparse
import json
from pathlib import Path

from examples.tiny_vlm.questions import caption
from examples.tiny_vlm.scene import Kind, Scene, Thing, paint

WHAT_IS_IN_IT = "What is in this picture?"


def _scene(
    kind: Kind, background: str, things: tuple[Thing, ...] = (), text: str = "", colour: str = ""
) -> Scene:
    return Scene(kind, background, things, text, colour, 1.0, 7)


def _thing(shape: str, colour: str, size: str, x: float, y: float, angle: float = 0.0) -> Thing:
    return Thing(shape, colour, size, x, y, 0.16 if size == "large" else 0.08, angle)


#: By name: the picture, and a question about it with its answer beside WHAT_IS_IN_IT.
PICTURES = {
    "red_circle": (
        _scene(Kind.ONE, "white", (_thing("circle", "red", "large", 0.5, 0.5),)),
        "What colour is the circle?",
        "The circle is red.",
    ),
    "heart_and_moon": (
        _scene(
            Kind.FEW,
            "light blue",
            (_thing("heart", "pink", "large", 0.2, 0.2), _thing("moon", "yellow", "large", 0.8, 0.8)),
        ),
        "Where is the moon?",
        "The moon is at the bottom right.",
    ),
    "square_and_triangle": (
        _scene(
            Kind.FEW,
            "beige",
            (_thing("triangle", "green", "large", 0.18, 0.5), _thing("square", "blue", "small", 0.82, 0.5)),
        ),
        "What shape is the blue thing?",
        "The blue shape is a square.",
    ),
    "five_stars": (
        _scene(
            Kind.COUNT,
            "black",
            tuple(
                _thing("star", "yellow", "small", x, y, 9 * (x - y))
                for x, y in ((0.13, 0.12), (0.62, 0.13), (0.38, 0.38), (0.87, 0.62), (0.13, 0.87))
            ),
        ),
        "How many stars are there?",
        "There are five stars.",
    ),
    "word_tree": (
        _scene(Kind.WORD, "light green", text="tree", colour="brown"),
        "What word is written?",
        "The word is tree.",
    ),
    "number_42": (
        _scene(Kind.NUMBER, "white", text="42", colour="purple"),
        "What number is written?",
        "The number is 42.",
    ),
    "three_things": (
        _scene(
            Kind.FEW,
            "grey",
            (
                _thing("cross", "white", "small", 0.5, 0.17),
                _thing("diamond", "orange", "large", 0.2, 0.5),
                _thing("circle", "blue", "large", 0.8, 0.8),
            ),
        ),
        "What colour is the diamond?",
        "The diamond is orange.",
    ),
    "two_crosses": (
        _scene(
            Kind.COUNT,
            "white",
            (_thing("cross", "green", "small", 0.37, 0.37), _thing("cross", "green", "small", 0.63, 0.62)),
        ),
        "How many crosses are there?",
        "There are two crosses.",
    ),
}


def main() -> None:
    """Write the pictures, and answers.json with what is asked about them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    answers = {}
    for name, (scene, question, answer) in PICTURES.items():
        paint(scene).save(out / f"{name}.png", optimize=True)
        answers[f"{name}.png"] = {WHAT_IS_IN_IT: f"The picture shows {caption(scene)}.", question: answer}
    (out / "answers.json").write_text(json.dumps(answers, indent=2) + "\n")


if __name__ == "__main__":
    main()

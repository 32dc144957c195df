"""The small vision-language model of the repository, by the code that serves."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.tiny_vlm.served import ServedModel

ROOT = Path(__file__).parents[3]
IMAGES = ROOT / "examples/images"


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return ServedModel(str(ROOT / "examples/tiny_vlm/model"))


def picture(name: str) -> np.ndarray:
    with Image.open(IMAGES / name) as image:
        return np.asarray(image.convert("RGB"))


def test_the_answer_is_that_of_the_picture(model: ServedModel) -> None:
    name = "three_things.png"
    question, answer = list(json.loads((IMAGES / "answers.json").read_text())[name].items())[1]
    assert model.answer([picture(name)], question) == answer


def test_the_answer_is_that_of_the_picture_asked_for(model: ServedModel) -> None:
    pictures = [picture("red_circle.png"), picture("word_tree.png")]
    answer = model.answer(pictures, "What is in the second picture?")
    assert answer == "The second picture shows the word tree."

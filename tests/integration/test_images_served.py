"""Requests with pictures through gateways and real workers: the same answer in every shape, and what pictures cost."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.support.image_shapes import SHAPES, E, ServedImages, image_request, served
from tests.support.pictures import picture
from tests.support.tiny_qwen_vl import write_qwen_vl_folder
from tests.support.tiny_vision_models import write_vision_folder
from workers.api import Phase

#: Of a picture of 50 x 30 pixels, one block each.
NUM_TILES = 7
PROMPTS = [
    ("<image>what is it?", [1]),
    ("look at <image> and then at <image>: which one is it", [1, 2]),
    ("<image><image><image><image>", [3, 4, 3, 5]),
    ("no picture at all", []),
    ("text before the only picture <image>", [2]),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    write_vision_folder(folder)
    return folder


def run(model: Path, shape: str, scenario: Callable[[ServedImages], Awaitable[None]], **engine: int) -> None:
    async def main() -> None:
        async with served(model, SHAPES[shape], **engine) as it:
            await scenario(it)
            await it.check_invariants()

    asyncio.run(main())


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    """Of each prompt, by one worker that does all, one after the other."""
    found: list[list[int]] = []

    async def scenario(it: ServedImages) -> None:
        for text, seeds in PROMPTS:
            found.append(await it.tokens(image_request(text, *map(picture, seeds))))

    run(model, "EPD", scenario)
    # The pictures matter.
    assert len({tuple(tokens) for tokens in found}) == len(found)
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_the_answer_is_the_same_in_every_shape(model: Path, shape: str, expected: list[list[int]]) -> None:
    async def scenario(it: ServedImages) -> None:
        requests = [image_request(text, *map(picture, seeds)) for text, seeds in PROMPTS]
        # All at once, and again with everything cached.
        for _ in range(2):
            assert list(await asyncio.gather(*map(it.tokens, requests))) == expected

    run(model, shape, scenario)


def test_positions_that_follow_pictures_survive_the_hand_off(tmp_path: Path) -> None:
    """M-RoPE: decode elsewhere goes on from the positions that the pictures left."""
    write_qwen_vl_folder(tmp_path)
    texts = [text.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>") for text, _ in PROMPTS]
    requests = [
        image_request(text, *(picture(seed, 60 + 20 * seed, 90) for seed in seeds))
        for text, (_, seeds) in zip(texts, PROMPTS, strict=True)
    ]
    answers: list[list[list[int]]] = []

    async def scenario(it: ServedImages) -> None:
        answers.append(list(await asyncio.gather(*map(it.tokens, requests))))

    run(tmp_path, "EPD", scenario)
    run(tmp_path, "2E+2P+D", scenario)
    assert answers[0] == answers[1]
    assert len({tuple(tokens) for tokens in answers[0]}) == len(requests)


@pytest.mark.parametrize("shape", ["E+P+D", "2E+2P+D", "EPD+EPD"])
def test_a_picture_that_several_send_at_once_is_encoded_once(model: Path, shape: str) -> None:
    async def scenario(it: ServedImages) -> None:
        text = "<image> what is it?"
        await it.tokens(image_request(text, picture(9)))
        num_tiles = num_encoded(it)
        # Another one, which nobody has seen before any of them asks.
        requests = [image_request(f"{i} {text}", picture(8)) for i in range(6)]
        await asyncio.gather(*map(it.tokens, requests))
        assert num_encoded(it) == 2 * num_tiles
        await it.tokens(image_request(f"again {text}", picture(8)))
        assert num_encoded(it) == 2 * num_tiles

    run(model, shape, scenario)


def num_encoded(it: ServedImages) -> int:
    """Tiles, over all encoders."""
    return sum(one.worker.status().embeddings.num_tiles_encoded for one in it.with_phase(Phase.ENCODE))


def test_tenants_share_no_embeddings(model: Path) -> None:
    async def scenario(it: ServedImages) -> None:
        (encoder,) = it.with_phase(Phase.ENCODE)
        one = image_request("<image> what is it?", picture(9), cache_salt="one")
        two = image_request("<image> what is it?", picture(9), cache_salt="two")
        first = await it.tokens(one)
        num_tiles = encoder.worker.status().embeddings.num_tiles_encoded
        assert await it.tokens(two) == first
        assert encoder.worker.status().embeddings.num_tiles_encoded == 2 * num_tiles
        costs = encoder.worker.status().encode_costs
        assert costs is not None
        assert costs.num_batches > 0

    run(model, "E+P+D", scenario)


def test_pictures_of_one_request_are_spread_over_the_encoders(model: Path) -> None:
    async def scenario(it: ServedImages) -> None:
        pictures = [picture(seed) for seed in range(20, 28)]
        await it.tokens(image_request("<image>" * 8, *pictures))
        shares = [one.worker.status().embeddings.num_tiles_encoded for one in it.workers[:2]]
        assert shares[0] == shares[1] > 0

    run(model, "2E+2P+D", scenario)


def test_workers_that_encode_for_each_other_do_not_wait_for_each_other(model: Path) -> None:
    """Prompts at both, with more pictures at a time than there is room for, some of them the same."""

    async def scenario(it: ServedImages) -> None:
        same = image_request("<image> what is it?", picture(9))
        others = [
            image_request("<image>" * 4, *(picture(first + i) for i in range(4)))
            for first in (20, 30, 40, 50)
        ]
        requests = [same, same, same, same, *others]
        answers = await asyncio.gather(*map(it.tokens, requests))
        assert len({tuple(tokens) for tokens in answers[:4]}) == 1
        assert all(one.worker.status().embeddings.num_tiles_encoded > 0 for one in it.workers)
        # That they hold no embeddings any more is checked when they end.

    # Two halves, each with room for the tiles of five pictures.
    run(model, "EPD+EPD", scenario, image_cache_bytes=2 * 5 * NUM_TILES * 16 * 64 * 4)


def test_a_pool_smaller_than_all_that_is_asked_serves_all_in_turn(
    model: Path, expected: list[list[int]]
) -> None:
    async def scenario(it: ServedImages) -> None:
        requests = [image_request(text, *map(picture, seeds)) for text, seeds in PROMPTS] * 3
        answers = await asyncio.gather(*map(it.tokens, requests))
        assert list(answers) == expected * 3
        assert it.workers[0].worker.status().embeddings.num_evictions > 0

    # 30 blocks of one tile each.
    run(model, "E+P+D", scenario, image_cache_bytes=30 * 16 * 64 * 4)


def test_an_encode_worker_holds_no_text_model(model: Path) -> None:
    async def scenario(it: ServedImages) -> None:
        (encoder,) = [one for one in it.workers if one.worker.spec.phases == E]
        assert encoder.worker.text is None
        assert encoder.worker.status().blocks.total == 0

    run(model, "E+P+D", scenario)

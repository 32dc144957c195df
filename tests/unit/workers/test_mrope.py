"""Positions of M-RoPE are those of transformers, however a prompt is cut."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLModel,
    Qwen2_5_VLRotaryEmbedding,
)

from workers.api import ImageTile
from workers.model.config import ModelConfig, RopeConfig
from workers.model.hf_folder import JsonValues
from workers.model.hf_rope import read_mrope
from workers.model.mrope import mrope_delta, mrope_positions
from workers.model.rope import Rope

IMAGE_TOKEN_ID = 9
MERGE_SIZE = 2


class _Theirs(Qwen2_5_VLModel):
    """What `get_rope_index` reads, without weights."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.config = Qwen2_5_VLConfig(image_token_id=IMAGE_TOKEN_ID)


THEIRS = _Theirs()


def their_positions(token_ids: list[int], grids: list[tuple[int, int]]) -> tuple[np.ndarray, int]:
    """[3, num_tokens], and the delta."""
    tokens = torch.tensor([token_ids])
    patches = torch.tensor([[1, rows * MERGE_SIZE, cols * MERGE_SIZE] for rows, cols in grids])
    is_image = (tokens == IMAGE_TOKEN_ID).int()
    positions, deltas = THEIRS.get_rope_index(tokens, is_image, image_grid_thw=patches if grids else None)
    return positions[:, 0].numpy(), int(deltas)


def prompt(grids: list[tuple[int, int]], texts: list[int]) -> tuple[list[int], list[ImageTile]]:
    """Token ids with so many tokens of text before, between and after pictures; two pictures are never neighbours."""
    token_ids, images = [1] * texts[0], []
    for (rows, cols), num_tokens in zip(grids, texts[1:], strict=True):
        images.append(ImageTile(len(token_ids), rows * cols, b"key", (1, rows, cols)))
        token_ids += [IMAGE_TOKEN_ID] * (rows * cols) + [1] * num_tokens
    return token_ids, images


SIDES = st.integers(1, 7)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(SIDES, SIDES), min_size=0, max_size=4).flatmap(
        lambda grids: st.tuples(
            st.just(grids), st.lists(st.integers(1, 9), min_size=len(grids) + 1, max_size=len(grids) + 1)
        )
    ),
    st.randoms(use_true_random=False),
)
def test_mrope_positions_equal_those_of_transformers_in_whole_and_in_chunks(drawn, random) -> None:
    grids, texts = drawn
    token_ids, images = prompt(grids, texts)
    expected, delta = their_positions(token_ids, grids)
    num_tokens = len(token_ids)
    assert np.array_equal(mrope_positions(images, 0, num_tokens), expected)
    assert mrope_delta(images) == delta
    cut = random.randrange(num_tokens + 1)
    other_cut = random.randrange(cut, num_tokens + 1)
    parts = [
        mrope_positions(images, start, end)
        for start, end in ((0, cut), (cut, other_cut), (other_cut, num_tokens))
    ]
    assert np.array_equal(np.concatenate(parts, axis=1), expected)


def test_a_prompt_without_pictures_has_its_places_as_positions() -> None:
    assert mrope_positions([], 3, 6).tolist() == [[3, 4, 5]] * 3
    assert mrope_delta([]) == 0


def test_positions_of_a_prefix_do_not_depend_on_what_follows() -> None:
    _, images = prompt([(3, 5), (4, 2)], [2, 3, 4])
    end_of_first = images[0].start + images[0].num_embeddings
    for end in (end_of_first - 4, end_of_first + 2):
        assert np.array_equal(mrope_positions(images, 0, end), mrope_positions(images[:1], 0, end))


def test_tokens_after_all_pictures_are_at_their_place_plus_the_delta() -> None:
    token_ids, images = prompt([(3, 5), (4, 2)], [2, 3, 4])
    end = len(token_ids)
    expected = np.arange(end, end + 5) + mrope_delta(images)
    assert np.array_equal(mrope_positions(images, end, end + 5), np.stack([expected] * 3))


@pytest.mark.parametrize("grid", [None, (1, 2, 2), (0, 2, 3), (-1, -2, 3)])
def test_a_picture_whose_grid_is_not_that_of_its_embeddings_is_an_error(
    grid: tuple[int, int, int] | None,
) -> None:
    image = ImageTile(0, 6, b"key", grid)
    with pytest.raises(ValueError, match="6 embeddings"):
        mrope_positions([image], 0, 6)
    with pytest.raises(ValueError, match="6 embeddings"):
        mrope_delta([image])


SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling["rope_type"])
def test_angles_are_those_of_transformers_with_each_scaling(scaling: dict[str, Any]) -> None:
    values = {"max_position_embeddings": 256}
    parameters = {**scaling, "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    theirs = Qwen2_5_VLRotaryEmbedding(
        Qwen2_5_VLTextConfig(
            hidden_size=64, num_attention_heads=4, num_key_value_heads=2, rope_parameters=parameters, **values
        )
    )
    rope, _ = read_mrope(JsonValues("config.json", {**values, "rope_parameters": parameters}), "here", 1e6)
    token_ids, images = prompt([(3, 5), (4, 2)], [2, 90, 4])
    positions = torch.from_numpy(mrope_positions(images, 0, len(token_ids)))
    expected_cos, expected_sin = theirs(torch.zeros(1), positions[:, None])
    cos, sin = Rope(_config(rope)).cos_sin(positions, None)
    assert torch.equal(cos[:, 0], expected_cos[0])
    assert torch.equal(sin[:, 0], expected_sin[0])


def _config(rope: RopeConfig) -> ModelConfig:
    """Of heads of 16; the rest does not matter to angles."""
    config = ModelConfig("qwen2_5_vl", 1, 64, 96, 4, 2, 16, rope, 1e-6, 256, 384, False, (), "", "")
    config.validate()
    return config

"""Pictures are resized for Qwen2.5-VL, and stand in prompts, as transformers has it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)

from workers.errors import ImageRejected
from workers.model.vision.qwen2_5_vl import Qwen25Encoder
from workers.model.vision.qwen2_5_vl_config import Qwen25Vision

#: The numbers of the published models.
VISION = Qwen25Vision(
    num_layers=2,
    hidden_size=16,
    intermediate_size=24,
    num_heads=2,
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    window_size=112,
    full_attention_layers=(1,),
    text_hidden_size=32,
    image_token="<|image_pad|>",
    image_token_id=151655,
    start_token="<|vision_start|>",
    end_token="<|vision_end|>",
    min_pixels=56 * 56,
    max_pixels=12845056,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    rescale_factor=1 / 255,
    resample=3,
)
PROCESSOR: Any = Qwen2VLImageProcessorPil(min_pixels=VISION.min_pixels, max_pixels=VISION.max_pixels)
SIDE = st.one_of(st.integers(1, 300), st.integers(1, 20000))


@settings(max_examples=300, deadline=None)
@given(SIDE, SIDE, st.sampled_from([56 * 56, 28 * 28 * 1280, 12845056, 200]))
@example(1, 1, 56 * 56)
@example(1, 200, 56 * 56)
@example(201, 1, 56 * 56)
@example(42, 70, 12845056)
@example(20000, 20000, 200)
def test_sizes_are_those_of_transformers(width: int, height: int, max_pixels: int) -> None:
    vision = replace(VISION, max_pixels=max_pixels, min_pixels=min(VISION.min_pixels, max_pixels))
    try:
        new_height, new_width = smart_resize(height, width, 28, vision.min_pixels, max_pixels)
    except ValueError:
        with pytest.raises(ImageRejected, match=f"it has {width} x {height} pixels"):
            vision.plan(width, height)
        return
    plan = vision.plan(width, height)
    assert vision.resized(width, height) == (new_width, new_height)
    (tile,) = plan.tiles
    assert (tile.rows, tile.cols) == (new_height // 14, new_width // 14)
    assert plan.grid == (1, tile.rows // 2, tile.cols // 2)
    assert plan.num_embeddings == tile.num_embeddings == tile.rows * tile.cols // 4


def test_a_picture_is_its_embeddings_between_two_tokens() -> None:
    plan = VISION.plan(100, 60)
    assert plan.grid == (1, 2, 4)
    assert plan.text == "<|vision_start|>" + "<|image_pad|>" * 8 + "<|vision_end|>"
    assert (plan.width, plan.height) == (100, 60)


@pytest.mark.parametrize(("width", "height"), [(0, 10), (10, 0), (1, 201)])
def test_a_picture_of_no_possible_shape_is_an_error_that_says_what_to_do(width: int, height: int) -> None:
    with pytest.raises(ImageRejected, match="Crop it"):
        VISION.plan(width, height)


@pytest.mark.parametrize(("width", "height"), [(56, 56), (123, 45), (31, 400), (1, 90), (300, 290)])
def test_pixels_are_those_of_transformers(width: int, height: int) -> None:
    image = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    expected = PROCESSOR([Image.fromarray(image)], return_tensors="pt")
    plan = VISION.plan(width, height)
    encoder = Qwen25Encoder(replace(VISION, num_layers=0), _no_weights())
    (pixels,) = encoder.prepare(image, plan, range(1))
    assert pixels.dtype == torch.float32
    assert expected["image_grid_thw"].tolist() == [[1, plan.tiles[0].rows, plan.tiles[0].cols]]
    assert torch.equal(_as_patches(pixels), expected["pixel_values"])


def test_preparing_no_tiles_gives_none() -> None:
    encoder = Qwen25Encoder(replace(VISION, num_layers=0), _no_weights())
    assert encoder.prepare(np.zeros((60, 100, 3), np.uint8), VISION.plan(100, 60), range(0)) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_heads": 3}, "heads"),
        ({"num_heads": 16}, "multiple of 4"),
        ({"window_size": 27}, "windows of 27 pixels"),
        ({"full_attention_layers": (2,)}, "of 2 layers"),
        ({"mean": (0.5,)}, "three numbers"),
        ({"std": (0.5, 0.5, 0.0)}, "three numbers"),
        ({"min_pixels": 100, "max_pixels": 99}, "at least 100"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"resample": 6}, "filter 6"),
    ],
)
def test_a_shape_that_makes_no_sense_is_refused(changes: dict[str, Any], problem: str) -> None:
    VISION.validate()
    with pytest.raises(ValueError, match=problem):
        replace(VISION, **changes).validate()


def _no_weights() -> dict[str, torch.Tensor]:
    merger = {
        f"vision.merger_{name}": torch.empty(0) for name in ("norm", "in", "in_bias", "out", "out_bias")
    }
    return {**merger, "vision.patch_embedding": torch.zeros(16, 3 * 2 * 14 * 14)}


def _as_patches(pixels: torch.Tensor) -> torch.Tensor:
    """As transformers has them: square by square, each patch repeated in time, [num_patches, 3 * 2 * 14 * 14]."""
    _, height, width = pixels.shape
    squares = pixels.view(3, height // 28, 2, 14, width // 28, 2, 14).permute(1, 4, 2, 5, 0, 3, 6)
    patches = squares.reshape(-1, 3, 1, 14, 14)
    return patches.expand(-1, -1, 2, -1, -1).reshape(len(patches), -1)

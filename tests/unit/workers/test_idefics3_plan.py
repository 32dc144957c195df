"""How pictures are cut and stand in a prompt for Idefics3 and SmolVLM: as transformers' processors have it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.image_utils import SizeDict
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from tests.support.tiny_vision_models import AROUND, GLOBAL, IMAGE
from workers.model.vision.config import (
    Idefics3Vision,
    processor_digest,
    read_vision_json,
    vision_from_values,
    vision_json,
)

SMOLVLM = Idefics3Vision(
    num_layers=12, hidden_size=768, intermediate_size=3072, num_heads=12, patch_size=16, image_size=512,
    scale_factor=4, layer_norm_eps=1e-6, text_hidden_size=576, image_token=IMAGE, image_token_id=49190,
    around_text=AROUND, global_text=GLOBAL, is_tiled=True, longest_edge=2048, tile_size=512,
    mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), rescale_factor=1 / 255, resample=1,
)  # fmt: skip
#: As published: SmolVLM, SmolVLM2, Idefics3, one that the limit of 4096 pixels cuts short, and one view only.
SHAPES = (
    SMOLVLM,
    replace(SMOLVLM, longest_edge=1536, tile_size=384, image_size=384, scale_factor=3),
    replace(SMOLVLM, longest_edge=1456, tile_size=364, image_size=364, patch_size=14, scale_factor=2),
    replace(SMOLVLM, longest_edge=5000),
    replace(SMOLVLM, is_tiled=False),
    replace(SMOLVLM, longest_edge=100),
)
SIDES = st.one_of(st.integers(1, 40), st.integers(1, 6000), st.integers(1, 1_000_000))


class _SizesOnly(Idefics3ImageProcessorPil):
    """Resizes nothing: the picture's memory is one pixel, whatever its size."""

    def resize(self, image: Any, size: SizeDict, resample: Any = None, **kwargs: Any) -> Any:
        if size.longest_edge:
            theirs: Any = super().resize
            found: list[tuple[int, int]] = []
            # What the processor hands to Pillow.
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    "transformers.image_processing_backends.np_resize",
                    lambda _image, size, **_options: found.append(size) or image,
                )
                theirs(image, size, resample=resample)
            height, width = found[0]
        else:
            height, width = size.height or 0, size.width or 0
        return _blank(width, height)


def _blank(width: int, height: int) -> Any:
    return np.broadcast_to(np.uint8(0), (3, height, width))


def their_grid(config: Idefics3Vision, width: int, height: int) -> tuple[int, int]:
    """Rows and columns that transformers cuts a picture into; 0, 0 for one view."""
    processor: Any = _SizesOnly()
    if not config.is_tiled:
        return 0, 0
    resized = processor.resize(_blank(width, height), SizeDict(longest_edge=config.longest_edge))
    whole = processor.resize_for_vision_encoder(resized, config.tile_size)
    tiles, rows, cols = processor.split_images(whole, {"longest_edge": config.tile_size})
    assert all(tile.shape == (3, config.tile_size, config.tile_size) for tile in tiles)
    assert len(tiles) == rows * cols + 1
    return rows, cols


@settings(max_examples=150, deadline=None)
@given(config=st.sampled_from(SHAPES), width=SIDES, height=SIDES)
@example(config=SMOLVLM, width=1, height=1)
@example(config=SMOLVLM, width=1, height=1_000_000)
@example(config=SMOLVLM, width=1_000_000, height=1)
@example(config=SMOLVLM, width=2048, height=2048)
@example(config=SHAPES[3], width=5000, height=3)
@example(config=SHAPES[3], width=3, height=5001)
def test_tiles_and_text_are_those_of_the_processors(config: Idefics3Vision, width: int, height: int) -> None:
    rows, cols = their_grid(config, width, height)
    plan = config.plan(width, height)
    assert len(plan.tiles) == rows * cols + 1
    assert plan.num_embeddings == plan.text.count(IMAGE) == len(plan.tiles) * config.tile_embeddings
    assert plan.num_patches == len(plan.tiles) * (config.tile_size // config.patch_size) ** 2
    assert plan.text == get_image_prompt_string(rows, cols, config.tile_embeddings, AROUND, IMAGE, GLOBAL)
    assert (plan.width, plan.height, plan.grid) == (width, height, None)


@pytest.mark.parametrize(("rows", "cols"), [(0, 0), (1, 2), (3, 4)])
def test_both_processors_write_the_same_text(rows: int, cols: int) -> None:
    """So that one plan serves both."""
    idefics3: Any = Idefics3Processor.__new__(Idefics3Processor)
    idefics3.fake_image_token, idefics3.global_image_tag, idefics3.image_token = AROUND, GLOBAL, IMAGE
    idefics3.image_seq_len = 9
    text = idefics3.replace_image_token({"rows": [[rows]], "cols": [[cols]]}, 0)
    assert text == get_image_prompt_string(rows, cols, 9, AROUND, IMAGE, GLOBAL)


def test_texts_around_pictures_may_be_empty() -> None:
    config = replace(SMOLVLM, is_tiled=False, around_text="", global_text="", tile_size=64)
    assert config.plan(9, 9).text == IMAGE


def test_cost_follows_the_aspect_ratio() -> None:
    """The numbers in docs/multimodal.md."""
    for width, height, num_tiles, num_embeddings in (
        (9, 9, 17, 1088),
        (5000, 5000, 17, 1088),
        (40, 10, 5, 320),
    ):
        plan = SMOLVLM.plan(width, height)
        assert (len(plan.tiles), plan.num_embeddings) == (num_tiles, num_embeddings)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_a_picture_without_pixels_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="sides of at least 1"):
        SMOLVLM.plan(*size)


@pytest.mark.parametrize("config", SHAPES)
def test_published_shapes_are_valid_and_survive_json(config: Idefics3Vision) -> None:
    config.validate()
    assert read_vision_json(vision_json(config)) == config


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"patch_size": 0}, "patch_size is 0"),
        ({"num_heads": 5}, "768 in 5 heads"),
        ({"image_size": 8}, "pictures of 8 pixels"),
        ({"tile_size": 500}, "31 patches a side: not a multiple of the 4"),
        ({"tile_size": 8}, "0 patches a side"),
        ({"std": (0.5, 0.5)}, "three numbers"),
        ({"std": (0.5, 0.5, 0.0)}, "three numbers"),
        ({"resample": 6}, "filter 6"),
        ({"image_token": ""}, "image token"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        replace(SMOLVLM, **changes).validate()


@pytest.mark.parametrize("values", [None, [], {}, {"family": "idefics4"}, {"family": "idefics3"}])
def test_other_json_is_refused(values: object) -> None:
    with pytest.raises(ValueError, match="not a vision configuration"):
        vision_from_values(values)


def test_the_processors_digest_follows_its_numbers() -> None:
    changes: tuple[dict[str, Any], ...] = (
        {}, {"mean": (0.5, 0.5, 0.4)}, {"longest_edge": 2049}, {"resample": 3}, {"is_tiled": False},
    )  # fmt: skip
    assert len({processor_digest(replace(SMOLVLM, **change)) for change in changes}) == len(changes)
    assert processor_digest(SMOLVLM) == processor_digest(replace(SMOLVLM))

"""Folders of Idefics3 and SmolVLM, loaded as any other, compute what transformers computes: pixels, embeddings, tokens."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

from tests.support.tiny_vision_models import (
    IMAGE,
    IMAGE_TOKEN_ID,
    LAYOUTS,
    Layout,
    image_processor,
    their_tiles,
    write_vision_folder,
)
from tests.support.vision_generate import our_greedy, their_greedy
from workers.model.llama import Llama
from workers.model.prepare import PreparedModel, load_weights, prepare
from workers.model.vision.config import Idefics3Vision
from workers.model.vision.idefics3 import Idefics3Encoder, embed_tiles, position_ids

#: uint8 in, the same steps in the same order.
PIXEL_TOLERANCE = 1e-6
#: fp32 sums of up to a few hundred products in another order, over a few layers.
EMBEDDING_TOLERANCE = LOGIT_TOLERANCE = 1e-4
NUM_GENERATED = 16
#: Width and height: both orientations, thin ones, one pixel, larger than all tiles together, and the same twice.
SIZES = ((64, 48), (33, 90), (200, 3), (1, 1), (150, 150), (64, 48))
#: Where pictures stand: before, between and after text, side by side, and none.
PROMPTS = {
    "between": ("look at {} and {} then say", (0, 1)),
    "before": ("{} what is it", (2,)),
    "after": ("there it is: {}", (3,)),
    "together": ("{}{}{} three of them {}", (4, 0, 5, 1)),
    "none": ("nothing to see here", ()),
}


def picture(width: int, height: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)


PICTURES = [picture(*size) for size in SIZES]
VISION = Idefics3Vision(
    num_layers=1, hidden_size=4, intermediate_size=4, num_heads=1, patch_size=7, image_size=28, scale_factor=1,
    layer_norm_eps=1e-6, text_hidden_size=4, image_token=IMAGE, image_token_id=1, around_text="", global_text="",
    is_tiled=True, longest_edge=28, tile_size=28, mean=(0.5,) * 3, std=(0.5,) * 3, rescale_factor=1 / 255, resample=1,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Loaded:
    """One folder in both implementations."""

    folder: Path
    layout: Layout
    is_smolvlm: bool
    theirs: Any
    prepared: PreparedModel
    model: Llama
    encoder: Idefics3Encoder
    vision: Idefics3Vision

    def pixels(self, image: np.ndarray[Any, np.dtype[np.uint8]]) -> list[torch.Tensor]:
        plan = self.vision.plan(image.shape[1], image.shape[0])
        return self.encoder.prepare(image, plan, range(len(plan.tiles)))


def load(folder: Path, name: str, **options: Any) -> Loaded:
    layout, is_smolvlm = LAYOUTS[name], options.get("is_smolvlm", False)
    theirs = write_vision_folder(folder / "model", layout, **options)
    prepared = prepare(str(folder / "model"), lambda _what, _done: None, folder / "cache")
    vision = prepared.config.vision
    assert isinstance(vision, Idefics3Vision)
    weights = load_weights(prepared)
    model, encoder = Llama(prepared.config, weights), Idefics3Encoder(vision, weights)
    return Loaded(folder / "model", layout, is_smolvlm, theirs, prepared, model, encoder, vision)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small take much longer with two where other processes have the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["idefics3", "smolvlm"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    is_smolvlm = request.param == "smolvlm"
    return load(tmp_path_factory.mktemp("vision"), "tiles", is_smolvlm=is_smolvlm, is_old=is_smolvlm)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("is_smolvlm", [False, True], ids=["idefics3", "smolvlm"])
def test_pixels_and_embeddings_are_those_of_transformers(name: str, is_smolvlm: bool, tmp_path: Path) -> None:
    loaded = load(tmp_path, name, is_smolvlm=is_smolvlm, is_old=not is_smolvlm, tied=is_smolvlm)
    for image in PICTURES:
        expected, text = their_tiles(loaded.layout, image, is_smolvlm=is_smolvlm)
        assert loaded.vision.plan(image.shape[1], image.shape[0]).text == text
        pixels = loaded.pixels(image)
        assert (torch.stack(pixels) - expected).abs().max() <= PIXEL_TOLERANCE
        with torch.inference_mode():
            theirs = loaded.theirs.model.get_image_features(expected[None]).pooler_output
        ours = loaded.encoder.encode(pixels)
        assert [one.shape for one in ours] == [(loaded.layout.tile_embeddings, 64)] * len(pixels)
        assert (torch.cat(ours) - torch.cat(list(theirs))).abs().max() < EMBEDDING_TOLERANCE


@pytest.mark.parametrize(
    ("tile_size", "image_size"), [(28, 28), (196, 196), (364, 364), (196, 364), (364, 196), (14, 14)]
)
def test_positions_of_patches_are_those_of_transformers(tile_size: int, image_size: int) -> None:
    """Fractions are rounded: with some sides, patches take their neighbour's position."""
    theirs = Idefics3VisionEmbeddings(
        Idefics3VisionConfig(hidden_size=1, patch_size=7, image_size=image_size)
    )
    side = tile_size // 7
    with torch.no_grad():
        # What comes out is the position itself.
        theirs.patch_embedding.weight.zero_()
        theirs.patch_embedding.bias.zero_()
        theirs.position_embedding.weight.copy_(torch.arange((image_size // 7) ** 2)[:, None])
        found = theirs(torch.zeros(1, 3, tile_size, tile_size), torch.ones(1, side, side, dtype=torch.bool))
    vision = replace(VISION, patch_size=7, image_size=image_size, tile_size=tile_size)
    assert position_ids(vision, torch.device("cpu")).tolist() == found.flatten().int().tolist()


def test_a_tile_has_the_same_embeddings_alone_and_among_others(loaded: Loaded) -> None:
    pixels = [tile for image in PICTURES for tile in loaded.pixels(image)]
    together = loaded.encoder.encode(pixels)
    for i in range(0, len(pixels), 5):
        (alone,) = loaded.encoder.encode(pixels[i : i + 1])
        assert (alone - together[i]).abs().max() < 1e-5
    assert loaded.encoder.encode([]) == []


def test_tiles_can_be_prepared_apart(loaded: Loaded) -> None:
    """Shards of one picture on several workers."""
    image = PICTURES[4]
    plan = loaded.vision.plan(image.shape[1], image.shape[0])
    whole = loaded.pixels(image)
    parts = [range(2), range(2, len(plan.tiles) - 1), range(len(plan.tiles) - 1, len(plan.tiles))]
    apart = [tile for part in parts for tile in loaded.encoder.prepare(image, plan, part)]
    assert all(torch.equal(one, other) for one, other in zip(whole, apart, strict=True))


def prompt(loaded: Loaded, text: str, images: tuple[int, ...]) -> tuple[list[int], torch.Tensor | None]:
    """Our tokens of a prompt, and transformers' pixels."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(loaded.folder / "tokenizer.json"))
    plans = [loaded.vision.plan(*SIZES[i]) for i in images]
    token_ids: list[int] = tokenizer(text.format(*(plan.text for plan in plans)))["input_ids"]
    if not images:
        return token_ids, None
    tiles = [their_tiles(loaded.layout, PICTURES[i], is_smolvlm=loaded.is_smolvlm)[0] for i in images]
    return token_ids, torch.cat(tiles)[None]


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_tokens_are_those_of_transformers(loaded: Loaded, name: str) -> None:
    text, images = PROMPTS[name]
    token_ids, pixel_values = prompt(loaded, text, images)
    their_logits, their_tokens = their_greedy(loaded.theirs, token_ids, pixel_values, NUM_GENERATED)
    embeddings = loaded.encoder.encode([tile for i in images for tile in loaded.pixels(PICTURES[i])])
    # The cut is within a picture where there is one.
    cuts = (len(token_ids) // 2, len(token_ids) // 2 + 3)
    our_logits, our_tokens = our_greedy(
        loaded.model, token_ids, IMAGE_TOKEN_ID, embeddings, NUM_GENERATED, cuts
    )
    assert (our_logits - their_logits).abs().max() < LOGIT_TOLERANCE
    assert our_tokens == their_tokens
    # Else equal tokens would say little.
    assert len(set(our_tokens)) > NUM_GENERATED // 4


def test_a_whole_prompt_is_that_of_the_processor(tmp_path: Path) -> None:
    loaded = load(tmp_path, "tiles")
    text, images = PROMPTS["together"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(loaded.folder / "tokenizer.json"))
    processor: Any = Idefics3Processor(
        image_processor(loaded.layout), tokenizer, image_seq_len=loaded.layout.tile_embeddings
    )
    pictures = [Image.fromarray(PICTURES[i]) for i in images]
    theirs = processor(images=pictures, text=text.format(*[IMAGE] * len(images)))["input_ids"][0]
    assert prompt(loaded, text, images)[0] == theirs


def test_the_answer_depends_on_the_picture(loaded: Loaded) -> None:
    token_ids, _ = prompt(loaded, *PROMPTS["between"])
    embeddings = loaded.encoder.encode([tile for i in (0, 1) for tile in loaded.pixels(PICTURES[i])])
    right, _ = our_greedy(loaded.model, token_ids, IMAGE_TOKEN_ID, embeddings, 1)
    other, _ = our_greedy(loaded.model, token_ids, IMAGE_TOKEN_ID, embeddings[::-1], 1)
    assert (right[-1] - other[-1]).abs().max() > 100 * LOGIT_TOLERANCE


def test_gradients_flow_to_every_weight(loaded: Loaded) -> None:
    """Training runs the same function."""
    weights = {
        name: tensor.clone().requires_grad_()
        for name, tensor in load_weights(loaded.prepared).items()
        if name.startswith("vision.")
    }
    pixels = torch.stack(loaded.pixels(PICTURES[0]))
    embed_tiles(loaded.vision, weights, pixels).square().sum().backward()
    assert all(tensor.grad is not None and bool(tensor.grad.any()) for tensor in weights.values())

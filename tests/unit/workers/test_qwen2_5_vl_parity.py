"""Folders of Qwen2.5-VL, loaded as any other, compute what transformers computes from them: pictures and tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.engine_fakes import BOTH, key
from tests.support.engine_model import EngineWithModel
from tests.support.generate import Session
from tests.support.tiny_qwen_vl import IMAGE_TOKEN_ID, Spelling, processor, write_qwen_vl_folder
from workers.api import ImageTile, NgramDrafts, SamplingParams, Submit
from workers.embeddings.memory import BLOCK_SIZE, embedding_layout, host_memory
from workers.engine.messages import ImageReady, ImagesNeeded
from workers.engine.runner import ModelRunner
from workers.model.config import RopeScaling
from workers.model.llama import Embeds, Llama
from workers.model.mrope import mrope_positions
from workers.model.prepare import Part, load_weights, prepare
from workers.model.vision.qwen2_5_vl import Qwen25Encoder
from workers.model.vision.qwen2_5_vl_config import Qwen25Vision

#: fp32 sums of up to 192 products in another order, over three layers.
EMBEDDING_TOLERANCE = 1e-4
LOGIT_TOLERANCE = 1e-4
NUM_GENERATED = 24
#: Width and height: whole windows, parts of windows, one square high, shrunk and stretched.
SIZES = ((64, 64), (100, 33), (7, 90), (300, 200), (64, 64), (5, 5))
#: Pictures of one prompt by index in SIZES, and tokens of text before, between and after them.
PROMPTS: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((1, 3, 0), (5, 3, 1, 9)),
    ((2,), (0, 4)),
    ((0, 1), (17, 0, 2)),
    ((), (12,)),
)


@dataclass(frozen=True, slots=True)
class Loaded:
    """One folder in both implementations."""

    theirs: Any
    model: Llama
    encoder: Qwen25Encoder
    vision: Qwen25Vision


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens with embeddings among them."""

    token_ids: list[int]
    tiles: tuple[ImageTile, ...]
    embeddings: list[torch.Tensor]
    #: What transformers is given.
    pixel_values: torch.Tensor | None
    grids: torch.Tensor | None

    def rows(self) -> torch.Tensor:
        """Places of the embeddings."""
        return torch.tensor(
            [place for tile in self.tiles for place in range(tile.start, tile.start + tile.num_embeddings)],
            dtype=torch.int64,
        )


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(tmp_path_factory.mktemp("qwen"), Spelling.NEW)


def load(folder: Path, spelling: Spelling, *, tied: bool = False) -> Loaded:
    theirs = write_qwen_vl_folder(folder / "model", spelling, tied=tied)
    prepared = prepare(str(folder / "model"), lambda _what, _done: None, folder / "cache")
    vision = prepared.config.vision
    assert isinstance(vision, Qwen25Vision)
    # Each part is read alone, as by workers that only encode, or never do.
    model = Llama(prepared.config, load_weights(prepared, {Part.TEXT}))
    encoder = Qwen25Encoder(vision, load_weights(prepared, {Part.VISION}))
    return Loaded(theirs, model, encoder, vision)


def picture(width: int, height: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)


PICTURES = [picture(*size) for size in SIZES]


def their_pixels(pictures: Sequence[np.ndarray[Any, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    inputs: Any = processor()([Image.fromarray(one) for one in pictures], return_tensors="pt")
    return inputs["pixel_values"], inputs["image_grid_thw"]


def our_embeddings(loaded: Loaded, pictures: Sequence[np.ndarray[Any, Any]]) -> list[torch.Tensor]:
    pixels = [
        tile
        for one in pictures
        for tile in loaded.encoder.prepare(one, loaded.vision.plan(one.shape[1], one.shape[0]), range(1))
    ]
    return loaded.encoder.encode(pixels)


def prompt(loaded: Loaded, images: Sequence[int], texts: Sequence[int]) -> Prompt:
    """Pictures between texts of so many tokens; each picture has its start and end tokens."""
    rng = np.random.default_rng(len(images))
    vision = loaded.vision
    token_ids: list[int] = rng.integers(3, 380, texts[0]).tolist()
    tiles = []
    for i, num_tokens in zip(images, texts[1:], strict=True):
        plan = vision.plan(*SIZES[i])
        tiles.append(ImageTile(len(token_ids) + 1, plan.num_embeddings, b"%d" % i, plan.grid))
        token_ids += [384, *[IMAGE_TOKEN_ID] * plan.num_embeddings, 385]
        token_ids += rng.integers(3, 380, num_tokens).tolist()
    pictures = [PICTURES[i] for i in images]
    pixel_values, grids = their_pixels(pictures) if pictures else (None, None)
    return Prompt(token_ids, tuple(tiles), our_embeddings(loaded, pictures), pixel_values, grids)


@torch.inference_mode()
def their_greedy(theirs: Any, given: Prompt) -> tuple[torch.Tensor, list[int]]:
    """Logits of the prompt, [num_tokens, vocab_size], and what is generated after it."""
    inputs = torch.tensor([given.token_ids])
    pictures = {
        "pixel_values": given.pixel_values,
        "image_grid_thw": given.grids,
        "mm_token_type_ids": (inputs == IMAGE_TOKEN_ID).int(),
    }
    theirs.model.rope_deltas = None
    result = theirs(inputs, use_cache=True, **(pictures if given.tiles else {}))
    logits, generated = result.logits[0], [int(result.logits[0, -1].argmax())]
    while len(generated) < NUM_GENERATED:
        result = theirs(
            torch.tensor([generated[-1:]]), past_key_values=result.past_key_values, use_cache=True
        )
        generated.append(int(result.logits[0, -1].argmax()))
    return logits, generated


def our_greedy(model: Llama, given: Prompt, cut: int) -> tuple[torch.Tensor, list[int]]:
    """The same; the prompt is computed in two chunks that meet at `cut`, which may be within a picture."""
    num_tokens = len(given.token_ids)
    session = Session(model, num_tokens + NUM_GENERATED)
    rows, values = given.rows(), torch.cat([*given.embeddings, torch.empty(0, model.config.hidden_size)])

    def feed(token_ids: list[int]) -> torch.Tensor:
        start = session.num_tokens
        end = start + len(token_ids)
        here = (rows >= start) & (rows < end)
        return session.feed(
            token_ids,
            embeds=Embeds(rows[here] - start, values[here]),
            rope_positions=torch.from_numpy(mrope_positions(given.tiles, start, end)),
        )

    logits = torch.cat([feed(part) for part in (given.token_ids[:cut], given.token_ids[cut:]) if part])
    generated = [int(logits[-1].argmax())]
    while len(generated) < NUM_GENERATED:
        generated.append(int(feed(generated[-1:])[-1].argmax()))
    return logits, generated


@pytest.mark.parametrize("spelling", list(Spelling))
def test_embeddings_and_tokens_are_those_of_transformers_in_every_spelling(
    spelling: Spelling, tmp_path: Path
) -> None:
    loaded = load(tmp_path, spelling, tied=spelling is Spelling.OLD)
    given = prompt(loaded, (1, 0), (2, 3, 4))
    with torch.inference_mode():
        expected = loaded.theirs.model.visual(given.pixel_values, grid_thw=given.grids).pooler_output
    assert (torch.cat(given.embeddings) - expected).abs().max() < EMBEDDING_TOLERANCE
    _, their_tokens = their_greedy(loaded.theirs, given)
    _, our_tokens = our_greedy(loaded.model, given, 0)
    assert our_tokens == their_tokens


def test_embeddings_of_pictures_of_all_sizes_together_are_those_of_transformers(loaded: Loaded) -> None:
    pixel_values, grids = their_pixels(PICTURES)
    with torch.inference_mode():
        expected = loaded.theirs.model.visual(pixel_values, grid_thw=grids).pooler_output
    found = our_embeddings(loaded, PICTURES)
    assert [len(one) for one in found] == (grids.prod(-1) // 4).tolist()
    assert (torch.cat(found) - expected).abs().max() < EMBEDDING_TOLERANCE


def test_a_picture_alone_has_the_embeddings_that_it_has_among_others(loaded: Loaded) -> None:
    together = our_embeddings(loaded, PICTURES)
    for one, among_others in zip(PICTURES, together, strict=True):
        (alone,) = our_embeddings(loaded, [one])
        assert (alone - among_others).abs().max() < 1e-5
    assert loaded.encoder.encode([]) == []


@pytest.mark.parametrize(("images", "texts"), PROMPTS)
def test_greedy_tokens_are_those_of_transformers(
    loaded: Loaded, images: tuple[int, ...], texts: tuple[int, ...]
) -> None:
    given = prompt(loaded, images, texts)
    their_logits, their_tokens = their_greedy(loaded.theirs, given)
    our_logits, our_tokens = our_greedy(loaded.model, given, cut=len(given.token_ids) // 2)
    assert (our_logits - their_logits).abs().max() < LOGIT_TOLERANCE
    assert our_tokens == their_tokens
    # Else equal tokens would say little.
    assert len(set(our_tokens)) > NUM_GENERATED // 4


def test_positions_matter_to_these_tokens(loaded: Loaded) -> None:
    given = prompt(loaded, *PROMPTS[0])
    session = Session(loaded.model, len(given.token_ids))
    plain = session.feed(given.token_ids, embeds=Embeds(given.rows(), torch.cat(given.embeddings)))
    right, _ = our_greedy(loaded.model, given, 0)
    assert (plain[-1] - right[-1]).abs().max() > 100 * LOGIT_TOLERANCE


def test_without_pictures_the_rotation_is_plain_to_the_bit(loaded: Loaded) -> None:
    given = prompt(loaded, (), (20,))
    with_axes, _ = our_greedy(loaded.model, given, 0)
    plain = Session(loaded.model, 20).feed(given.token_ids)
    assert torch.equal(with_axes, plain)


def test_keys_cannot_be_moved_as_they_depend_on_pictures_before(loaded: Loaded) -> None:
    assert not loaded.model.can_move_keys


def test_kv_of_other_sections_is_of_another_layout(loaded: Loaded) -> None:
    config = loaded.model.config
    other = replace(config, rope=replace(config.rope, mrope_section=(4, 2, 2)))
    layouts = [
        one.kv_layout(
            block_size=4, dtype="float32", model_digest="m", weight_dtype="float32"
        ).position_encoding
        for one in (config, other)
    ]
    assert layouts == ["rope:theta=10000,mrope_section=2/3/3", "rope:theta=10000,mrope_section=4/2/2"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"mrope_section": (2, 3, 4)}, "for heads of 16"),
        ({"mrope_section": (4, 4)}, "not of time, height and width"),
        ({"mrope_section": (10, -4, 2)}, "not of time, height and width"),
        ({"scaling": RopeScaling.DYNAMIC, "original_context_tokens": 64}, "scaling dynamic"),
    ],
)
def test_sections_that_make_no_rotation_are_refused(
    loaded: Loaded, changes: dict[str, Any], problem: str
) -> None:
    config = loaded.model.config
    with pytest.raises(ValueError, match=problem):
        replace(config, rope=replace(config.rope, **changes)).validate()


@pytest.fixture(scope="module")
def generated(loaded: Loaded) -> list[tuple[Prompt, list[int]]]:
    """PROMPTS, and what is generated after each."""
    prompts = [prompt(loaded, images, texts) for images, texts in PROMPTS]
    return [(given, our_greedy(loaded.model, given, 0)[1]) for given in prompts]


@pytest.mark.parametrize("decoding", [None, NgramDrafts(4)])
def test_an_engine_generates_the_same_in_chunks_with_a_known_prefix_and_with_drafts(
    loaded: Loaded, generated: list[tuple[Prompt, list[int]]], decoding: NgramDrafts | None
) -> None:
    """Prompts in one engine, together, twice: the second time the beginning is in the prefix cache."""
    sampling = SamplingParams(NUM_GENERATED, decoding=decoding)
    world = _EngineWithPictures(loaded)
    for attempt in ("first", "second"):
        for i, (given, _) in enumerate(generated):
            world.submit_with_pictures(f"{attempt} {i}", given, sampling)
        world.run()
        for i, (_, expected) in enumerate(generated):
            assert world.tokens[f"{attempt} {i}"] == expected
    assert world.num_cached["second 0"] > 0
    if decoding is not None:
        # Some were accepted: tokens follow KV that was written for drafts.
        assert any(report.num_tokens > report.num_steps for report in world.reports.values())


class _EngineWithPictures(EngineWithModel):
    """Embeddings are there when they are asked for."""

    def __init__(self, loaded: Loaded) -> None:
        super().__init__(loaded.model, num_blocks=128)
        layout = embedding_layout(loaded.model.config.hidden_size, model_digest="m", processor_digest="p")
        self._memory = host_memory(layout, 64)
        self.runner = ModelRunner(
            loaded.model, self.runner._kv_cache, self.runner._block_size, embeddings=self._memory
        )
        self._prompts: dict[str, Prompt] = {}
        self._num_blocks = 0

    def submit_with_pictures(self, name: str, given: Prompt, sampling: SamplingParams) -> None:
        self._prompts[name] = given
        self._begin[name] = len(given.token_ids)
        self.engine.handle(
            Submit(key(name), BOTH, tuple(given.token_ids), sampling, 1e6, images=given.tiles),
            float(self.num_steps),
        )
        self._read()

    def _read(self) -> None:
        num_seen = len(self.outputs)
        super()._read()
        for output in self.outputs[num_seen:]:
            if isinstance(output, ImagesNeeded):
                for i, tile in output.tiles:
                    num = -(-tile.num_embeddings // BLOCK_SIZE)
                    blocks = tuple((self._num_blocks + j) % 64 for j in range(num))
                    self._num_blocks += num
                    self._memory.write(blocks, [self._prompts[output.key.request_id].embeddings[i]])
                    self.engine.handle(ImageReady(output.key, i, blocks), float(self.num_steps))

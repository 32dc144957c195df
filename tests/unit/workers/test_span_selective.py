"""The selective forward pass: against a plain one at its two ends, and what its choice is made by."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.generate import BLOCK_SIZE, Session
from tests.support.tiny_model import write_tiny_gguf
from workers.engine.span_reuse.selection import attention_mass, by_deviation, deviation, highest, v_deviation
from workers.model.config import ModelConfig, RopeScaling
from workers.model.llama import ForwardBatch, Llama
from workers.model.prepare import load_weights, prepare
from workers.model.rope import Rope
from workers.model.selective import CheckedLayer, Choose, Reused, SelectiveBatch

#: Logits reach 20; sums are added up in another order.
LOGIT_TOLERANCE = 1e-4
#: K reach 10, and a rotation moves them by a few roundings of their angles.
KEY_TOLERANCE = 1e-4

ROPES = {
    "plain": {},
    "linear": {"scaling": RopeScaling.LINEAR, "factor": 4.0},
    "llama3": {"scaling": RopeScaling.LLAMA3, "factor": 8.0, "original_context_tokens": 64},
    "yarn": {
        "scaling": RopeScaling.YARN,
        "factor": 4.0,
        "original_context_tokens": 64,
        "attention_factor": 1.14,
    },
}


class World:
    """One KV cache with documents that were computed each alone, and room for a prompt."""

    def __init__(self, model: Llama, num_blocks: int = 64) -> None:
        self.model = model
        self.kv_cache = torch.full(model.kv_cache_shape(num_blocks, BLOCK_SIZE), float("nan"))
        self._next_block = 0

    def take(self, num_tokens: int) -> list[int]:
        num_blocks = -(-num_tokens // BLOCK_SIZE)
        self._next_block += num_blocks
        # Out of order.
        return list(range(self._next_block - 1, self._next_block - num_blocks - 1, -1))

    def prefill(self, token_ids: Sequence[int], table: Sequence[int], start: int = 0) -> torch.Tensor:
        positions = torch.arange(start, len(token_ids))
        batch = ForwardBatch(
            token_ids=torch.tensor(token_ids[start:]),
            positions=positions,
            slots=slots(table, positions),
            block_tables=np.array([table], np.int32),
            query_lens=np.array([len(positions)]),
            context_lens=np.array([len(token_ids)]),
            logit_rows=torch.tensor([len(positions) - 1]),
        )
        return self.model.forward(batch, self.kv_cache)

    def kv(self, table: Sequence[int], num_tokens: int) -> torch.Tensor:
        return self.kv_cache.flatten(2, 3)[:, :, slots(table, torch.arange(num_tokens))]


def slots(table: Sequence[int], positions: torch.Tensor) -> torch.Tensor:
    return torch.tensor(table)[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE


def tokens(num: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    token_ids: list[int] = torch.randint(3, 384, (num,), generator=generator).tolist()
    return token_ids


def assembled(
    world: World, prompt: Sequence[int], spans: Sequence[tuple[int, int, Sequence[int], int]], start: int = 0
) -> tuple[SelectiveBatch, list[int]]:
    """A batch of `prompt[start:]`. spans: position in the prompt, length, table of the source, position there."""
    table = world.take(len(prompt))
    positions = torch.cat([torch.arange(at, at + num) for at, num, _, _ in spans] or [torch.zeros(0).long()])
    sources = [torch.arange(old, old + num) for _, num, _, old in spans]
    reused = Reused(
        positions=positions,
        source_slots=torch.cat(
            [slots(source, old) for (_, _, source, _), old in zip(spans, sources, strict=True)]
            or [torch.zeros(0).long()]
        ),
        source_positions=torch.cat(sources or [torch.zeros(0).long()]),
    )
    token_ids = torch.tensor(prompt[start:])
    return SelectiveBatch(token_ids, start, np.array(table, np.int32), BLOCK_SIZE, reused), table


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return tiny(tmp_path_factory.mktemp("spans"))


def tiny(folder: Path, **changes: object) -> Llama:
    prepared = prepare(
        str(write_tiny_gguf(folder / "tiny.gguf", num_layers=4)), lambda *_progress: None, folder / "cache"
    )
    return Llama(replace(prepared.config, **changes), load_weights(prepared))  # type: ignore[arg-type]


def two_documents(world: World) -> tuple[list[int], SelectiveBatch, list[int]]:
    """A prompt of a few tokens, two documents that were prefilled elsewhere and a question."""
    first, second = tokens(70, 1), tokens(53, 2)
    tables = []
    for document in (first, second):
        # Each after something else, so that no position is the same.
        table = world.take(len(document) + 9)
        world.prefill([*tokens(9, 3), *document], table)
        tables.append(table)
    prompt = [*tokens(21, 4), *first, *tokens(5, 5), *second, *tokens(11, 6)]
    batch, table = assembled(world, prompt, [(21, 70, tables[0], 9), (96, 53, tables[1], 9)])
    return prompt, batch, table


def test_all_recomputed_is_a_plain_prefill_to_the_bit(model: Llama) -> None:
    world = World(model)
    prompt, batch, table = two_documents(world)
    logits = model.forward_selectively(batch, world.kv_cache, by_deviation(1.0))
    plain = world.take(len(prompt))
    assert torch.equal(logits, world.prefill(prompt, plain))
    assert torch.equal(world.kv(table, len(prompt)), world.kv(plain, len(prompt)))


def test_none_recomputed_leaves_reused_kv_as_it_is_elsewhere(model: Llama) -> None:
    world = World(model)
    prompt, batch, table = two_documents(world)
    reused = batch.reused
    source = world.kv_cache.flatten(2, 3)[:, :, reused.source_slots].clone()
    logits = model.forward_selectively(batch, world.kv_cache, by_deviation(0.0))
    found = world.kv(table, len(prompt))[:, :, reused.positions]
    assert torch.equal(found[2:, 1], source[2:, 1])
    rope = Rope(model.config)
    for layer in range(2, model.config.num_layers):
        moved = rope.move(source[layer, 0], reused.source_positions, reused.positions)
        assert torch.equal(found[layer, 0], moved)
    # The first two layers are computed for all tokens in any case, from what is computed too.
    plain = world.take(len(prompt))
    expected = world.prefill(prompt, plain)
    assert torch.equal(world.kv(table, len(prompt))[:2], world.kv(plain, len(prompt))[:2])
    assert (logits - expected).abs().max() > 10 * LOGIT_TOLERANCE, "these documents are no test"
    assert logits.isfinite().all()


@pytest.mark.parametrize("fraction", [0.0, 0.35, 1.0])
def test_a_span_with_the_same_context_changes_nothing(model: Llama, fraction: float) -> None:
    world = World(model)
    prompt = tokens(90, 7)
    source = world.take(len(prompt))
    expected = world.prefill(prompt, source)
    batch, table = assembled(world, prompt, [(0, 64, source, 0)])
    scores: list[torch.Tensor] = []

    def choose(checked: CheckedLayer) -> torch.Tensor:
        scores.append(deviation(checked))
        return highest(scores[0], fraction)

    logits = model.forward_selectively(batch, world.kv_cache, choose)
    # The same up to the order in which rows are added up.
    assert scores[0].max() < 1e-4
    assert torch.allclose(logits, expected, atol=LOGIT_TOLERANCE)
    assert torch.allclose(world.kv(table, len(prompt)), world.kv(source, len(prompt)), atol=KEY_TOLERANCE)


@pytest.mark.parametrize("windows", [(), (0, 24, 0, 24), (16, 16, 40, 16)])
@pytest.mark.parametrize("nope_layers", [frozenset(), frozenset({0, 3})])
def test_rows_with_gaps_see_what_they_should(
    tmp_path: Path, windows: tuple[int, ...], nope_layers: frozenset[int]
) -> None:
    """Spans whose KV is exact: whatever is left out, the rest is as in a plain prefill."""
    model = tiny(tmp_path, sliding_windows=windows, nope_layers=nope_layers)
    world = World(model)
    prompt = tokens(150, 8)
    source = world.take(len(prompt))
    expected = world.prefill(prompt, source)
    batch, table = assembled(world, prompt, [(20, 31, source, 20), (60, 64, source, 60)])
    every_third: Choose = lambda checked: torch.arange(0, len(checked.batch.reused), 3)  # noqa: E731 - its type
    logits = model.forward_selectively(batch, world.kv_cache, every_third)
    assert torch.allclose(logits, expected, atol=LOGIT_TOLERANCE)
    assert torch.allclose(world.kv(table, len(prompt)), world.kv(source, len(prompt)), atol=KEY_TOLERANCE)


def test_what_is_in_the_blocks_before_is_read(model: Llama) -> None:
    world = World(model)
    prompt = tokens(120, 9)
    source = world.take(len(prompt))
    expected = world.prefill(prompt, source)
    batch, table = assembled(world, prompt, [(50, 40, source, 50)], start=37)
    world.prefill(prompt[:37], table[:3])
    logits = model.forward_selectively(batch, world.kv_cache, by_deviation(0.2))
    assert torch.allclose(logits, expected, atol=LOGIT_TOLERANCE)


def test_more_recomputed_tokens_come_closer_to_a_plain_prefill(model: Llama) -> None:
    errors = []
    for fraction in (0.0, 0.5, 1.0):
        world = World(model)
        prompt, batch, _ = two_documents(world)
        logits = model.forward_selectively(batch, world.kv_cache, by_deviation(fraction))
        errors.append(float((logits - world.prefill(prompt, world.take(len(prompt)))).abs().mean()))
    assert errors[0] > errors[1] > errors[2] == 0


@pytest.mark.parametrize("windows", [(), (24, 24, 24, 24)])
def test_attention_mass_is_the_column_sum_of_the_matrix(tmp_path: Path, windows: tuple[int, ...]) -> None:
    model = tiny(tmp_path, sliding_windows=windows)
    world = World(model)
    prompt, batch, _ = two_documents(world)
    found: list[CheckedLayer] = []

    def keep(checked: CheckedLayer) -> torch.Tensor:
        found.append(checked)
        return torch.arange(0)

    model.forward_selectively(batch, world.kv_cache, keep)
    (checked,) = found
    num_heads, head_dim = checked.query.shape[1:]
    keys = checked.keys.repeat_interleave(num_heads // checked.keys.shape[1], dim=1)
    scores = torch.einsum("qhd,khd->hqk", checked.query.double(), keys.double()) / head_dim**0.5
    distance = torch.arange(len(prompt))[:, None] - torch.arange(len(prompt))[None]
    is_hidden = (distance < 0) | (distance >= (windows[1] if windows else len(prompt)))
    matrix = scores.masked_fill(is_hidden, float("-inf")).softmax(dim=-1)
    expected = matrix.mean(dim=0).sum(dim=0)[batch.reused.positions].float()
    assert torch.allclose(attention_mass(checked), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(deviation(checked), attention_mass(checked) * v_deviation(checked))


@pytest.mark.parametrize("name", ROPES)
def test_moved_keys_of_the_first_layer_are_those_computed_there(tmp_path: Path, name: str) -> None:
    config = tiny_config(tmp_path)
    changed = replace(config, rope=replace(config.rope, **ROPES[name]))  # type: ignore[arg-type]
    prepared = prepare(str(tmp_path / "tiny.gguf"), lambda *_progress: None, tmp_path / "cache")
    model = Llama(changed, load_weights(prepared))
    document = tokens(40, 10)
    for old, new in ((0, 300), (300, 0), (17, 23)):
        keys = {}
        for position in (old, new):
            session = Session(model, 400)
            session.feed([*tokens(position, 11), *document])
            keys[position] = session.kv_cache[0, 0].flatten(0, 1)[
                slots(session.block_table, torch.arange(position, position + 40))
            ]
        places = torch.arange(40)
        moved = Rope(changed).move(keys[old], places + old, places + new)
        assert torch.allclose(moved, keys[new], atol=KEY_TOLERANCE)
        assert (keys[old] - keys[new]).abs().max() > 0.1


def tiny_config(folder: Path) -> ModelConfig:
    path = write_tiny_gguf(folder / "tiny.gguf", num_layers=2)
    return prepare(str(path), lambda *_progress: None, folder / "cache").config


def test_keys_are_not_moved_where_angles_depend_on_the_length(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    rope = replace(config.rope, scaling=RopeScaling.DYNAMIC, factor=2.0, original_context_tokens=64)
    places = torch.arange(3)
    with pytest.raises(ValueError, match="dynamic scaling"):
        Rope(replace(config, rope=rope)).move(torch.zeros(3, 1, 16), places, places)


def test_a_model_of_one_layer_is_computed_whole(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", num_layers=1)
    prepared = prepare(str(path), lambda *_progress: None, tmp_path / "cache")
    world = World(Llama(prepared.config, load_weights(prepared)))
    prompt, batch, _ = two_documents(world)
    logits = world.model.forward_selectively(batch, world.kv_cache, by_deviation(0.0))
    assert torch.allclose(logits, world.prefill(prompt, world.take(len(prompt))), atol=LOGIT_TOLERANCE)


def test_the_highest_scores_are_chosen_and_their_number_is_rounded_up() -> None:
    scores = torch.tensor([0.0, 5.0, 1.0, 4.0, 0.0])
    assert sorted(highest(scores, 0.3).tolist()) == [1, 3]
    assert sorted(highest(scores, 0.41).tolist()) == [1, 2, 3]
    assert highest(scores, 0.0).tolist() == []
    assert len(highest(scores, 1.0)) == 5
    assert len(highest(torch.ones(100), 0.07)) == 7

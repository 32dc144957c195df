"""The filter in prefill: the same as a whole prompt whose masks forbid what has left, layer by layer."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phasewise_kernels.kv_int4.op import PACKED_DTYPE, values_of
from phasewise_kernels.rms_norm.op import rms_norm
from tests.support.tiny_model import write_tiny_gguf
from workers.api import ImageReduction
from workers.model import reduction
from workers.model.forward_batch import Embeds, ForwardBatch
from workers.model.llama import Llama
from workers.model.prepare import load_weights, prepare
from workers.model.reduction import FilteringBatch, attention_given, device_attention, filter_layers

BLOCK_SIZE = 4
NUM_TOKENS, PICTURE = 24, range(3, 17)
NUM_LAYERS = 4
#: After layers 0 and 2.
LAYERS = (0.0, 0.5)
KEYS = (1, 8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    folder: Path = tmp_path_factory.mktemp("filter")
    path = write_tiny_gguf(folder / "tiny.gguf", num_layers=NUM_LAYERS)
    prepared = prepare(str(path), lambda *_progress: None, folder / "cache")
    return Llama(prepared.config, load_weights(prepared))


def _batch(
    model: Llama, *, individual: float, total: float = 1.0, positions: torch.Tensor | None = None
) -> FilteringBatch:
    generator = torch.Generator().manual_seed(1)
    token_ids = torch.randint(0, 300, (NUM_TOKENS,), generator=generator)
    values = 0.3 * torch.randn(len(PICTURE), model.config.hidden_size, generator=generator)
    places = torch.arange(NUM_TOKENS)
    return FilteringBatch(
        token_ids,
        places,
        positions.expand(3, -1) if positions is not None else None,
        None,
        Embeds(torch.tensor(PICTURE), values),
        torch.tensor([i in KEYS for i in range(len(PICTURE))]),
        # Not in order, so that a slot that is taken for another shows.
        np.array([5, 2, 7, 0, 1, 6, 3, 4], np.int32),
        BLOCK_SIZE,
        ImageReduction(
            global_threshold=total, individual_threshold=individual, key_fraction=0.0, layers=LAYERS
        ),
        True,
    )


def _cache(model: Llama) -> torch.Tensor:
    return torch.full(model.kv_cache_shape(8, BLOCK_SIZE), float("nan"))


def _plain(batch: FilteringBatch) -> ForwardBatch:
    lens = np.array([NUM_TOKENS])
    return ForwardBatch(
        batch.token_ids,
        batch.positions,
        batch.slots(batch.positions),
        batch.block_table[None],
        lens,
        lens,
        torch.tensor([NUM_TOKENS - 1]),
        embeds=batch.embeds,
        rope_positions=batch.rope_positions,
    )


def _masked(model: Llama, batch: FilteringBatch, next_token: int) -> tuple[torch.Tensor, list[int]]:
    """Logits of the last token and of the one after it, [2, vocab_size], and the rows that are left.

    Every row is computed in every layer; masks say who is seen. The token after the prompt sees nobody that has left.
    """
    config, num = model.config, NUM_TOKENS + 1
    places = torch.arange(num)
    positions = batch.positions if batch.rope_positions is None else batch.rope_positions[0]
    rotation = model._rope.cos_sin(torch.cat((positions, positions[-1:] + 1)), None)
    hidden = torch.nn.functional.embedding(
        torch.cat((batch.token_ids, torch.tensor([next_token]))), model._embedding
    )
    hidden[batch.embeds.rows] = batch.embeds.values
    left = torch.ones(num, dtype=torch.bool)
    seen_by_layer, states = [], []
    # First without the token after the prompt, to know who leaves; then with it.
    for is_known in (False, True):
        state, added = hidden.clone(), None
        for i, layer in enumerate(model._layers):
            cache = torch.zeros(2, num, 1, config.num_kv_heads, config.head_dim)
            normed = rms_norm(state, layer.attention_norm, config.rms_norm_eps, added=added)
            query = model._project(layer, normed, rotation, cache, places)
            keys, values = cache[:, :, 0]
            share = config.num_heads // config.num_kv_heads
            keys = keys.repeat_interleave(share, 1)
            values = values.repeat_interleave(share, 1)
            scores = torch.einsum("qhd,khd->hqk", query, keys) / config.head_dim**0.5
            seen = (places[None] <= places[:, None]) & left[None]
            if is_known:
                seen = seen_by_layer[i].clone()
                seen[-1] = left
            else:
                seen_by_layer.append(seen)
            attention = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            if not is_known and i in (0, 2):
                text = [row for row in range(NUM_TOKENS) if row not in PICTURE]
                given = attention.mean(0)[text]
                on_pictures = given[:, [row for row in PICTURE if left[row]]].sum()
                for number, row in enumerate(PICTURE):
                    asked = batch.reduction
                    if (
                        number not in KEYS
                        and given[:, row].sum() < asked.global_threshold * on_pictures
                        and given[:, row].max() < asked.individual_threshold
                    ):
                        left[row] = False
            added = model._mix(layer, state, torch.einsum("hqk,khd->qhd", attention, values))
        states.append(model._lm_head(rms_norm(state, model._norm, config.rms_norm_eps, added=added)))
    rows = left[:NUM_TOKENS].nonzero()[:, 0].tolist()
    return torch.stack((states[0][NUM_TOKENS - 1], states[1][NUM_TOKENS])), rows


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, PACKED_DTYPE])
def test_the_filter_reads_keys_in_fewer_bits(
    model: Llama, monkeypatch: pytest.MonkeyPatch, kv_dtype: torch.dtype
) -> None:
    """As on a GPU: the attention of one takes such caches."""
    monkeypatch.setattr(reduction, "host_attention", device_attention)
    batch = _batch(model, individual=0.05)
    exact = model.forward_filtering(batch, _cache(model))
    cache = torch.zeros(model.kv_cache_shape(8, BLOCK_SIZE, kv_dtype)).to(kv_dtype)
    found = model.forward_filtering(batch, cache)
    assert 0 < len(found.rows) < NUM_TOKENS
    # Few tokens are at the border.
    assert len(set(found.rows.tolist()) ^ set(exact.rows.tolist())) <= 3
    assert (found.logits - exact.logits).norm() < 0.3 * exact.logits.norm()
    # Those that are left have the first slots.
    slots = batch.slots(torch.arange(NUM_TOKENS))
    told = values_of(cache[-1, 0].flatten(0, 1)[slots], torch.float32).abs().sum((1, 2))
    assert told[: len(found.rows)].all()


def test_when_nothing_leaves_logits_and_kv_are_those_of_a_plain_prefill(model: Llama) -> None:
    batch, mine, theirs = _batch(model, individual=1e-9), _cache(model), _cache(model)
    found = model.forward_filtering(batch, mine)
    assert found.rows.tolist() == list(range(NUM_TOKENS))
    assert found.layer_rows == (NUM_TOKENS,) * NUM_LAYERS
    torch.testing.assert_close(found.logits, model.forward(_plain(batch), theirs), atol=1e-5, rtol=0)
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0, equal_nan=True)


@pytest.mark.parametrize(
    "positions", [None, torch.arange(NUM_TOKENS) + 5 * (torch.arange(NUM_TOKENS) > 8)], ids=["", "gap"]
)
def test_dropped_rows_are_as_if_masks_forbade_them(model: Llama, positions: torch.Tensor | None) -> None:
    batch, cache = _batch(model, individual=0.12, positions=positions), _cache(model)
    found = model.forward_filtering(batch, cache)
    expected, rows = _masked(model, batch, next_token=9)
    assert found.rows.tolist() == rows
    # Both layers dropped some, and neither all: otherwise this would not say much.
    first, middle, last = found.layer_rows[0], found.layer_rows[1], found.layer_rows[3]
    assert first > middle > last == len(rows) > NUM_TOKENS - len(PICTURE) + len(KEYS)
    torch.testing.assert_close(found.logits[0], expected[0], atol=1e-4, rtol=0)
    # The next token, on the KV that is left: in every layer that of the rows that stayed alone.
    num = len(rows)
    position = batch.positions[-1:] + 1 if positions is None else positions[-1:] + 1
    slots = batch.slots(torch.tensor([num]))
    decode = ForwardBatch(
        torch.tensor([9]),
        torch.tensor([num]),
        slots,
        batch.block_table[None],
        np.array([1]),
        np.array([num + 1]),
        torch.tensor([0]),
        rope_positions=position.expand(3, 1),
    )
    torch.testing.assert_close(model.forward(decode, cache)[0], expected[1], atol=1e-4, rtol=0)


def test_attention_as_on_a_gpu_leaves_the_same(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, mine, theirs = _batch(model, individual=0.12), _cache(model), _cache(model)
    expected = model.forward_filtering(batch, theirs)
    monkeypatch.setattr(reduction, "host_attention", reduction.device_attention)
    found = model.forward_filtering(batch, mine)
    assert found.rows.tolist() == expected.rows.tolist()
    assert found.layer_rows == expected.layer_rows
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0, equal_nan=True)


def test_keys_and_text_stay_whatever_the_thresholds(model: Llama) -> None:
    batch = _batch(model, individual=1.0)
    found = model.forward_filtering(batch, _cache(model))
    stay = [row for row in range(NUM_TOKENS) if row not in PICTURE or row - PICTURE.start in KEYS]
    assert found.rows.tolist() == stay


def test_a_prompt_that_ends_with_a_picture_keeps_its_last_row(model: Llama) -> None:
    batch = _batch(model, individual=1.0)
    end = PICTURE.stop
    cut = FilteringBatch(
        batch.token_ids[:end],
        batch.positions[:end],
        None,
        None,
        batch.embeds,
        torch.zeros(len(PICTURE), dtype=torch.bool),
        batch.block_table,
        BLOCK_SIZE,
        batch.reduction,
        True,
    )
    found = model.forward_filtering(cut, _cache(model))
    # Text before a picture gives it no attention, so that nothing is below a share of it.
    assert found.rows.tolist() == list(range(end))
    assert len(found.logits) == 1


def test_no_logits_are_computed_where_generated_tokens_follow(model: Llama) -> None:
    batch = _batch(model, individual=0.12)
    with_logits, without = _cache(model), _cache(model)
    expected = model.forward_filtering(batch, with_logits)
    fields = {name: getattr(batch, name) for name in FilteringBatch.__dataclass_fields__}
    found = model.forward_filtering(FilteringBatch(**{**fields, "wants_logits": False}), without)
    assert found.logits.shape == (0, model.config.vocab_size)
    assert found.rows.tolist() == expected.rows.tolist()
    torch.testing.assert_close(with_logits, without, equal_nan=True)


@pytest.mark.parametrize(
    ("num_layers", "expected"), [(32, {2, 6, 10, 14}), (30, {2, 6, 9, 13}), (4, {0, 1, 2}), (1, set())]
)
def test_layers_are_those_of_the_paper_at_the_models_depth(num_layers: int, expected: set[int]) -> None:
    reduction = ImageReduction(global_threshold=0.1, individual_threshold=0.1)
    assert filter_layers(reduction, num_layers) == expected
    assert filter_layers(ImageReduction(merge_threshold=0.5), num_layers) == frozenset()


@settings(max_examples=20, deadline=None)
@given(num_rows=st.integers(2, 300), window=st.sampled_from([0, 3, 50]), seed=st.integers(0, 9))
def test_attention_by_blocks_of_queries_is_attention(num_rows: int, window: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw: Callable[..., torch.Tensor] = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    query, keys = draw(num_rows, 4, 8), draw(num_rows, 2, 8)
    is_text = draw(num_rows) > 0
    is_text[0], is_text[-1] = False, True
    givers, takers = is_text.nonzero()[:, 0], (~is_text).nonzero()[:, 0]
    scores = torch.einsum("qhd,khd->hqk", query, keys.repeat_interleave(2, 1)) / 8**0.5
    row = torch.arange(num_rows)
    seen = row[None] <= row[:, None]
    if window:
        seen &= row[None] > row[:, None] - window
    attention = scores.masked_fill(~seen, float("-inf")).softmax(-1).mean(0)[givers][:, takers]
    total, most = attention_given(query, keys, givers, takers, window)
    torch.testing.assert_close(total, attention.sum(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(most, attention.amax(0), atol=1e-5, rtol=1e-4)

"""The forward pass: against transformers, against itself in other batches, and what it touches."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.support.embedded_model import embedded_llama, embedded_prepared, embedded_tokenizer
from tests.support.generate import BLOCK_SIZE, Session, greedy
from tests.support.hf_reference import hf_greedy, hf_llama, hf_logits
from tests.support.tiny_model import write_tiny_gguf
from workers.model.llama import ForwardBatch, Llama, Mixes
from workers.model.prepare import load_weights, prepare

#: Logits reach 20, and each passes fp32 sums of up to 96 products; what is left is the order of addition.
LOGIT_TOLERANCE = 1e-4
#: Of the embedded model, where oneDNN adds up in another order than transformers' MKL: against fp64 the first is off
#: by up to 2e-4 and the second by 1e-4, with logits up to 38.
EMBEDDED_LOGIT_TOLERANCE = 3e-4

#: Prompt lengths around the block size of 16, and how they are cut into chunks.
CHUNKINGS = [[1], [16], [17], [16, 16, 1], [5, 1, 30, 12], [1] * 20]

SHAPES = {
    "grouped, tied": {},
    "grouped, own LM head": {"tie_embeddings": False},
    "one KV head": {"heads": 8, "kv_heads": 1},
    "a KV head each": {"heads": 2, "kv_heads": 2, "num_layers": 3},
}


def load(path: Path, **shape: int) -> tuple[Llama, dict[str, torch.Tensor]]:
    prepared = prepare(
        str(write_tiny_gguf(path / "tiny.gguf", **shape)), lambda *_progress: None, path / "cache"
    )
    weights = load_weights(prepared)
    return Llama(prepared.config, weights), weights


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return load(tmp_path_factory.mktemp("llama"))[0]


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    token_ids: list[int] = torch.randint(3, 384, (num_tokens,), generator=generator).tolist()
    return token_ids


def fed_in_chunks(model: Llama, token_ids: Sequence[int], chunks: Sequence[int]) -> torch.Tensor:
    assert sum(chunks) == len(token_ids)
    session = Session(model, len(token_ids))
    parts, start = [], 0
    for size in chunks:
        parts.append(session.feed(token_ids[start : start + size]))
        start += size
    return torch.cat(parts)


def assert_same_logits(
    actual: torch.Tensor, expected: torch.Tensor, tolerance: float = LOGIT_TOLERANCE
) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_tiny_models_equal_transformers(tmp_path: Path, shape: dict[str, int]) -> None:
    model, weights = load(tmp_path, **shape)
    reference = hf_llama(model.config, weights)
    for chunks in CHUNKINGS:
        token_ids = prompt(sum(chunks))
        assert_same_logits(fed_in_chunks(model, token_ids, chunks), hf_logits(reference, token_ids))
    assert greedy(model, prompt(7), 60) == hf_greedy(reference, prompt(7), 60)


def test_last_position_of_the_context_equals_transformers(tmp_path: Path) -> None:
    model, weights = load(tmp_path, max_context_tokens=96)
    token_ids = prompt(96)
    expected = hf_logits(hf_llama(model.config, weights), token_ids)
    assert_same_logits(fed_in_chunks(model, token_ids, [95, 1]), expected)


def test_tiny_output_varies_so_that_comparing_tokens_means_something(tiny: Llama) -> None:
    assert len(set(greedy(tiny, prompt(5), 60))) > 20


def padded(block_tables: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    """As an array; what is beyond a sequence's blocks names no block."""
    array = np.full((len(block_tables), max(map(len, block_tables))), 2**30, np.int32)
    for row, block_table in zip(array, block_tables, strict=True):
        row[: len(block_table)] = block_table
    return array


class Mixed:
    """Several sequences in one cache, with some tokens computed before, each in a step of its own."""

    def __init__(self, model: Llama, lengths: Sequence[tuple[int, int]]) -> None:
        self.model = model
        self.tokens = [prompt(before + new, seed) for seed, (before, new) in enumerate(lengths)]
        self.num_before = [before for before, _ in lengths]
        num_blocks = [-(-len(tokens) // BLOCK_SIZE) for tokens in self.tokens]
        block_ids = torch.randperm(sum(num_blocks), generator=torch.Generator().manual_seed(1)).tolist()
        self.block_tables = [[block_ids.pop() for _ in range(count)] for count in num_blocks]
        self.kv_cache = torch.full(model.kv_cache_shape(sum(num_blocks), BLOCK_SIZE), float("nan"))
        for i, before in enumerate(self.num_before):
            if before:
                model.forward(self.batch([(i, 0, before)]), self.kv_cache)

    def batch(self, parts: Sequence[tuple[int, int, int]]) -> ForwardBatch:
        """Of (sequence, first token, end); logits of all tokens."""
        token_ids = [token for i, first, end in parts for token in self.tokens[i][first:end]]
        positions = [position for _, first, end in parts for position in range(first, end)]
        slots = [
            self.block_tables[i][position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            for i, first, end in parts
            for position in range(first, end)
        ]
        return ForwardBatch(
            token_ids=torch.tensor(token_ids),
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            block_tables=padded([self.block_tables[i] for i, _, _ in parts]),
            query_lens=np.array([end - first for _, first, end in parts]),
            context_lens=np.array([end for _, _, end in parts]),
            logit_rows=torch.arange(len(token_ids)),
        )

    def rest(self) -> ForwardBatch:
        """Everything not computed before, in one step."""
        return self.batch(
            [
                (i, before, len(tokens))
                for i, (before, tokens) in enumerate(zip(self.num_before, self.tokens, strict=True))
            ]
        )


def test_decode_and_prefill_in_one_step_equal_each_alone(tiny: Llama) -> None:
    lengths = [(4, 1), (0, 20), (33, 1), (15, 1), (16, 7), (0, 1)]
    mixed = Mixed(tiny, lengths)
    logits = tiny.forward(mixed.rest(), mixed.kv_cache).split([new for _, new in lengths])
    for tokens, (before, _), actual in zip(mixed.tokens, lengths, logits, strict=True):
        assert_same_logits(actual, Session(tiny, len(tokens)).feed(tokens)[before:])


def test_only_the_slots_of_the_batch_are_written(tiny: Llama) -> None:
    mixed = Mixed(tiny, [(3, 1), (0, 18)])
    before = mixed.kv_cache.clone()
    batch = mixed.rest()
    tiny.forward(batch, mixed.kv_cache)
    written = torch.zeros(before.shape[2] * BLOCK_SIZE, dtype=torch.bool)
    written[batch.slots] = True
    after = mixed.kv_cache.flatten(2, 3)
    assert not torch.isnan(after[:, :, written]).any()
    assert torch.equal(
        after[:, :, ~written].nan_to_num(0), before.flatten(2, 3)[:, :, ~written].nan_to_num(0)
    )


def test_only_the_rows_asked_for_get_logits(tiny: Llama) -> None:
    mixed = Mixed(tiny, [(0, 5), (0, 4)])
    batch = mixed.rest()
    all_logits = tiny.forward(batch, mixed.kv_cache)
    # Few rows and many, in any order, from the middle of a sequence too.
    for rows in ([], [4], [8, 0], [2], [7, 1, 3, 3]):
        logits = tiny.forward(
            replace(batch, logit_rows=torch.tensor(rows, dtype=torch.int64)), mixed.kv_cache
        )
        assert logits.shape == (len(rows), 384)
        assert_same_logits(logits, all_logits[rows])


def test_kv_of_all_rows_is_written_when_no_row_gets_logits(tiny: Llama) -> None:
    mixed, other = Mixed(tiny, [(0, 20)]), Mixed(tiny, [(0, 20)])
    tiny.forward(mixed.rest(), mixed.kv_cache)
    tiny.forward(replace(other.rest(), logit_rows=torch.tensor([], dtype=torch.int64)), other.kv_cache)
    torch.testing.assert_close(mixed.kv_cache, other.kv_cache, atol=1e-5, rtol=0, equal_nan=True)


def test_each_path_of_a_tree_equals_that_path_alone(tiny: Llama) -> None:
    context = prompt(19)
    # Parent of each node; -1 is the last token of the context.
    parents, nodes = [-1, 0, 0, 1, -1], prompt(5, seed=9)
    session = Session(tiny, 40)
    session.feed(context)
    mask = np.eye(len(nodes), dtype=np.bool_)
    depths = []
    for i, parent in enumerate(parents):
        if parent >= 0:
            mask[i] |= mask[parent]
        depths.append(int(mask[i].sum()))
    slots = [session.block_table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(19, 24)]
    batch = ForwardBatch(
        token_ids=torch.tensor(nodes),
        positions=torch.tensor(depths) + 18,
        slots=torch.tensor(slots),
        block_tables=np.array([session.block_table], np.int32),
        query_lens=np.array([len(nodes)]),
        context_lens=np.array([24]),
        logit_rows=torch.arange(len(nodes)),
        tree_masks={0: mask},
    )
    logits = tiny.forward(batch, session.kv_cache)
    for i in range(len(nodes)):
        path = [nodes[k] for k in np.flatnonzero(mask[i])]
        assert_same_logits(logits[i], Session(tiny, 40).feed(context + path)[-1])
    some = tiny.forward(replace(batch, logit_rows=torch.tensor([3])), session.kv_cache)
    assert_same_logits(some[0], logits[3])


def test_mixed_row_has_the_weighted_sum_of_embeddings(tmp_path: Path) -> None:
    model, weights = load(tmp_path)
    session = Session(model, 8)
    session.feed(prompt(3))
    slot = session.block_table[0] * BLOCK_SIZE + 3
    one = ForwardBatch(
        token_ids=torch.tensor([0]),
        positions=torch.tensor([3]),
        slots=torch.tensor([slot]),
        block_tables=np.array([session.block_table], np.int32),
        query_lens=np.array([1]),
        context_lens=np.array([4]),
        logit_rows=torch.tensor([0]),
        mixes=Mixes(torch.tensor([0]), torch.tensor([[7, 9]]), torch.tensor([[0.25, 0.75]])),
    )
    mixed = model.forward(one, session.kv_cache)
    # The same model with that sum in the place of a token's embedding.
    weights = {**weights, "embedding": weights["embedding"].clone(), "lm_head": weights["embedding"]}
    weights["embedding"][5] = 0.25 * weights["embedding"][7] + 0.75 * weights["embedding"][9]
    other = Llama(replace(model.config, tie_embeddings=False), weights)
    plain = other.forward(replace(one, token_ids=torch.tensor([5]), mixes=None), session.kv_cache)
    assert_same_logits(mixed, plain)


@pytest.mark.parametrize(
    ("layer_group_size", "expected"),
    [(1, [(0, 1), (1, 2), (2, 3)]), (2, [(0, 2), (2, 3)]), (5, [(0, 3)]), (None, [(0, 3)])],
)
def test_layers_are_announced_when_their_kv_is_in_the_cache(
    tmp_path: Path, layer_group_size: int | None, expected: list[tuple[int, int]]
) -> None:
    model, _ = load(tmp_path, num_layers=3)
    mixed = Mixed(model, [(0, 6)])
    batch = mixed.rest()
    announced: list[tuple[int, int]] = []

    def on_layers(layer_lo: int, layer_hi: int) -> None:
        announced.append((layer_lo, layer_hi))
        slots = mixed.kv_cache.flatten(2, 3)[:, :, batch.slots]
        assert not torch.isnan(slots[:layer_hi]).any()
        assert torch.isnan(slots[layer_hi:]).all()

    model.forward(batch, mixed.kv_cache, layer_group_size=layer_group_size, on_layers=on_layers)
    assert announced == expected


def test_kv_copied_to_other_blocks_continues_the_same(tiny: Llama) -> None:
    token_ids = prompt(21)
    source, target = Session(tiny, 40), Session(tiny, 48)
    source.feed(token_ids)
    blocks = -(-len(token_ids) // BLOCK_SIZE)
    target.kv_cache[:, :, target.block_table[:blocks]] = source.kv_cache[:, :, source.block_table[:blocks]]
    target.num_tokens = source.num_tokens
    assert torch.equal(source.feed([7]), target.feed([7]))


QUESTION = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
)


def test_embedded_model_knows_the_capital_of_france() -> None:
    tokenizer = embedded_tokenizer()
    generated = greedy(embedded_llama(), tokenizer.encode(QUESTION).ids, 20)
    assert (
        tokenizer.decode(generated, skip_special_tokens=False) == "The capital of France is Paris.<|im_end|>"
    )
    assert len(generated) == 8


@pytest.mark.parametrize(
    "text",
    [
        QUESTION,
        "Once",
        "日本の首都は東京です。 def f(x):\n    return x ** 2  🙂",
    ],
    ids=["chat", "one token", "not ASCII"],
)
def test_embedded_model_equals_transformers(text: str) -> None:
    prepared, model = embedded_prepared(), embedded_llama()
    reference = hf_llama(prepared.config, load_weights(prepared))
    token_ids = embedded_tokenizer().encode(text).ids
    expected = hf_logits(reference, token_ids)
    chunks = [16] * (len(token_ids) // 16) + [len(token_ids) % 16] * (len(token_ids) % 16 > 0)
    assert_same_logits(fed_in_chunks(model, token_ids, [len(token_ids)]), expected, EMBEDDED_LOGIT_TOLERANCE)
    assert_same_logits(fed_in_chunks(model, token_ids, chunks), expected, EMBEDDED_LOGIT_TOLERANCE)

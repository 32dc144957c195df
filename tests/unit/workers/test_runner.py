"""Steps as tensors: a mixed batch computes what its sequences compute one by one."""

import random

import pytest
import torch

from tests.support.generate import greedy
from tests.support.tiny_model import write_tiny_gguf
from workers.api import RequestId, RequestKey, SamplingParams
from workers.engine.runner import ModelRunner
from workers.engine.scheduler import Slice, StepPlan
from workers.engine.sequence import Sequence, SequenceState
from workers.model.llama import Llama
from workers.model.prepare import load_weights, prepare

BLOCK_SIZE = 16
NUM_BLOCKS = 40
NUM_NEW_TOKENS = 6
NUM_LAYERS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    folder = tmp_path_factory.mktemp("runner")
    path = write_tiny_gguf(folder / "tiny.gguf", num_layers=NUM_LAYERS)
    prepared = prepare(str(path), lambda *_progress: None, folder / "cache")
    return Llama(prepared.config, load_weights(prepared))


def make_runner(model: Llama) -> ModelRunner:
    """Unused slots are NaN: whatever reads one yields NaN."""
    kv_cache = torch.full(model.kv_cache_shape(NUM_BLOCKS, BLOCK_SIZE), float("nan"))
    return ModelRunner(model, kv_cache, BLOCK_SIZE, layer_group_size=2)


def make_sequence(name: str, token_ids: list[int], block_table: list[int]) -> Sequence:
    return Sequence(
        key=RequestKey(RequestId(name), 1),
        phases=frozenset(),
        sampling=SamplingParams(NUM_NEW_TOKENS),
        handoff=None,
        deadline_s=1.0,
        arrived_s=0.0,
        token_ids=list(token_ids),
        num_prompt_tokens=len(token_ids),
        state=SequenceState.PREFILL,
        block_table=block_table,
    )


def make_plan(*parts: tuple[Sequence, int]) -> StepPlan:
    """The next tokens of each sequence, at most this many."""
    slices = [
        Slice(
            sequence,
            sequence.num_computed_tokens,
            min(sequence.num_computed_tokens + size, len(sequence.token_ids)),
        )
        for sequence, size in parts
    ]
    return StepPlan(tuple(slices), ())


def step(runner: ModelRunner, plan: StepPlan) -> None:
    """Run it and do what the engine would."""
    token_ids = iter(runner.run(plan, lambda _lo, _hi: None))
    for part in plan.slices:
        token_id = next(token_ids) if part.yields_token else None
        part.sequence.num_computed_tokens = part.end
        if token_id is not None:
            part.sequence.token_ids.append(token_id)
    assert next(token_ids, None) is None


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 384, (size,), generator=generator).tolist() for size in (1, 16, 17, 40, 61)]


def test_chunks_and_decodes_in_one_batch_equal_one_by_one(model: Llama) -> None:
    runner = make_runner(model)
    free = random.Random(3).sample(range(NUM_BLOCKS), NUM_BLOCKS)
    sequences = [
        make_sequence(str(i), token_ids, [free.pop() for _ in range(6)])
        for i, token_ids in enumerate(prompts())
    ]
    # Each starts a step later than the one before, so prefill chunks and decodes meet.
    for num_started in range(1, 20):
        running = [
            sequence
            for sequence in sequences[:num_started]
            if len(sequence.token_ids) < sequence.num_prompt_tokens + NUM_NEW_TOKENS
        ]
        if not running:
            break
        step(runner, make_plan(*((sequence, BLOCK_SIZE) for sequence in running)))
    for sequence, token_ids in zip(sequences, prompts(), strict=True):
        generated = sequence.token_ids[sequence.num_prompt_tokens :]
        expected = greedy(model, token_ids, NUM_NEW_TOKENS)
        assert generated[: len(expected)] == expected
        assert len(generated) == NUM_NEW_TOKENS


def test_chunk_that_ends_inside_the_prompt_yields_nothing(model: Llama) -> None:
    sequence = make_sequence("a", list(range(3, 43)), [7, 2, 9])
    assert make_runner(model).run(make_plan((sequence, BLOCK_SIZE)), lambda _lo, _hi: None) == []


def test_layers_are_reported_in_groups_as_they_are_written(model: Llama) -> None:
    sequence = make_sequence("a", [3, 4, 5], [1])
    groups: list[tuple[int, int]] = []
    make_runner(model).run(make_plan((sequence, 3)), lambda lo, hi: groups.append((lo, hi)))
    assert groups == [(0, 2), (2, 3)]


def test_warm_up_leaves_no_trace_in_what_follows(model: Llama) -> None:
    runner = make_runner(model)
    runner.warm_up()
    sequence = make_sequence("a", list(range(3, 20)), [0, 1])
    step(runner, make_plan((sequence, 32)))
    assert sequence.token_ids[-1:] == greedy(model, range(3, 20), 1)

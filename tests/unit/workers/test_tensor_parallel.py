"""A group of ranks computes what one process does, whatever is in a step."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.host_pool import HostPool
from kvtransfer.pool import KvSpan, span_bytes
from tests.support.embedded_model import embedded_llama, embedded_prepared, embedded_tokenizer
from tests.support.engine_model import PLAIN, EngineWithModel
from tests.support.hf_folder import write_hf_folder
from tests.support.rank_group import Group, batch_of, group_of, prepared_model, whole
from tests.support.tiny_model import write_tiny_gguf
from workers.api import (
    NgramDrafts,
    SamplingParams,
    SuperposedDecoding,
)
from workers.model.forward_batch import ForwardBatch
from workers.model.prepare import PreparedModel
from workers.tensor_parallel.kv_pool import GroupPool
from workers.tensor_parallel.messages import pack, unpack

#: Of logits, relative to the largest: sums of fp32 in another order.
FP32_ERROR = 2e-5
#: A process that was killed is seen to have ended by then, on however slow a machine.
PATIENCE_S = 30.0
SCARCE = replace(PLAIN, growth_reserve=0.0, max_running_sequences=4)
LONG, SHARED = tuple(range(5, 65)), tuple(range(70, 95))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> PreparedModel:
    """Four heads, two KV heads, a tied LM head; an odd vocabulary, of which the last rank has less."""
    folder = tmp_path_factory.mktemp("llama")
    return prepared_model(write_tiny_gguf(folder / "tiny.gguf", vocab=383), folder / "cache")


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> PreparedModel:
    """A bias on every matrix, and an LM head of its own."""
    folder = tmp_path_factory.mktemp("biased")
    options = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
    return prepared_model(write_hf_folder(folder / "hf", "llama", **options), folder / "cache")


@pytest.fixture(scope="module")
def normed(tmp_path_factory: pytest.TempPathFactory) -> PreparedModel:
    """Norms of Q and K, whose weights no rank cuts."""
    folder = tmp_path_factory.mktemp("normed")
    return prepared_model(write_hf_folder(folder / "hf", "qwen3", head_dim=16), folder / "cache")


@pytest.fixture(scope="module")
def group(
    llama: PreparedModel, biased: PreparedModel, normed: PreparedModel
) -> Iterator[Callable[[str, int], Group]]:
    """Made when it is first asked for: ranks take seconds to start."""
    models, made = {"llama": llama, "biased": biased, "normed": normed}, dict[tuple[str, int], Group]()
    with ExitStack() as stack:

        def find(name: str, degree: int) -> Group:
            if (name, degree) not in made:
                made[name, degree] = stack.enter_context(group_of(models[name], degree))
            return made[name, degree]

        yield find


@pytest.fixture(scope="module")
def alone(llama: PreparedModel) -> Callable[[tuple[int, ...], int, SamplingParams], list[int]]:
    """What a request gets from one process that runs nothing else."""
    model, known = whole(llama), dict[object, list[int]]()

    def tokens(prompt: tuple[int, ...], max_new: int, sampling: SamplingParams) -> list[int]:
        request = prompt, max_new, sampling
        if request not in known:
            engine = EngineWithModel(model, replace(PLAIN, is_prefix_cache_on=False))
            engine.submit("alone", prompt, max_new, sampling=sampling)
            engine.run()
            known[request] = engine.tokens["alone"]
        return known[request]

    return tokens


@pytest.mark.parametrize(("name", "degree"), [("llama", 2), ("llama", 4), ("biased", 2), ("normed", 2)])
def test_logits_are_those_of_one_process(
    group: Callable[[str, int], Group], request: pytest.FixtureRequest, name: str, degree: int
) -> None:
    model = whole(request.getfixturevalue(name))
    expected = model.forward(batch_of(LONG), torch.zeros(model.kv_cache_shape(64, 4)))
    made = group(name, degree)
    assert made.placed.forward is not None
    found = made.placed.forward(batch_of(LONG))
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < FP32_ERROR * expected.abs().max()
    assert torch.equal(found.argmax(dim=1), expected.argmax(dim=1))


def test_real_weights_give_the_same_text_on_three_ranks() -> None:
    prompts = [
        tuple(embedded_tokenizer().encode(text).ids) for text in ("The capital of France is", "1, 2, 3, 4,")
    ]
    engines = [EngineWithModel(embedded_llama())]
    with group_of(embedded_prepared(), 3) as made:
        engines.append(made.engine())
        for engine in engines:
            for i, prompt in enumerate(prompts):
                engine.submit(str(i), prompt, 12)
            engine.run()
    assert engines[0].tokens == engines[1].tokens


@settings(max_examples=12, deadline=None)
@given(
    degree=st.sampled_from([2, 4]),
    requests=st.lists(
        st.tuples(
            st.builds(
                lambda one, other: one + other,
                st.sampled_from([(), SHARED[:12], SHARED]),
                st.lists(st.integers(3, 382), min_size=1, max_size=12).map(tuple),
            ),
            st.integers(1, 12),
            st.integers(0, 4),
        ),
        min_size=1,
        max_size=6,
    ),
    spare_blocks=st.sampled_from([0, 3, 20]),
    decoding=st.sampled_from([None, None, NgramDrafts(4)]),
    token_budget=st.sampled_from([8, 16, 64]),
    is_cache_on=st.booleans(),
)
def test_however_it_is_scheduled_a_request_gets_the_tokens_of_one_process(
    group: Callable[[str, int], Group],
    alone: Callable[[tuple[int, ...], int, SamplingParams], list[int]],
    degree: int,
    requests: list[tuple[tuple[int, ...], int, int]],
    spare_blocks: int,
    decoding: NgramDrafts | None,
    token_budget: int,
    is_cache_on: bool,
) -> None:
    """Greedy and sampled, chunked, mixed, preempted, from the prefix cache, with drafts."""
    longest = max(len(prompt) + max_new for prompt, max_new, _ in requests)
    config = replace(SCARCE, token_budget=token_budget, is_prefix_cache_on=is_cache_on)
    engine = group("llama", degree).engine(config, num_blocks=-(-longest // 4) + spare_blocks)
    samplings = [
        SamplingParams(1, temperature=0.0 if i % 2 == 0 else 1.0, seed=i, decoding=decoding)
        for i in range(len(requests))
    ]
    for step in range(max(arrival for *_, arrival in requests) + 1):
        for i, (prompt, max_new, arrival) in enumerate(requests):
            if arrival == step:
                engine.submit(str(i), prompt, max_new, sampling=samplings[i])
        engine.step()
    engine.run()
    assert not engine.failed
    for i, (prompt, max_new, _) in enumerate(requests):
        assert engine.tokens[str(i)] == alone(prompt, max_new, replace(samplings[i], decoding=None))


def test_preempted_sequences_and_cached_prefixes_are_among_them(group: Callable[[str, int], Group]) -> None:
    made = group("llama", 2).engine(SCARCE, num_blocks=16)
    for i in range(4):
        made.submit(f"r{i}", (*SHARED, i + 3), 14)
    made.run()
    made.submit("again", (*SHARED, 9), 2)
    made.run()
    assert made.engine.num_preemptions > 0
    assert made.num_cached["again"] > 0


def test_accepted_drafts_are_kept_on_all_ranks(
    group: Callable[[str, int], Group], alone: Callable[[tuple[int, ...], int, SamplingParams], list[int]]
) -> None:
    made, prompt = group("llama", 2).engine(), tuple(range(20, 36))
    for name in ("first", "again"):
        made.submit(name, prompt, 60, sampling=SamplingParams(1, decoding=NgramDrafts(6)))
        made.run()
        assert made.tokens[name] == alone(prompt, 60, SamplingParams(1))
    assert made.reports["again"].num_steps < 30


def test_blocks_are_copied_and_slots_moved_on_all_ranks(group: Callable[[str, int], Group]) -> None:
    made = group("llama", 4)
    followers, pool = made.placed.followers, made.placed.pool
    assert followers is not None
    assert isinstance(pool, GroupPool)
    caches = [reach() for reach in pool._open[1:]]
    for cache in caches:
        cache.copy_(torch.arange(64.0)[:, None, None, None] + torch.arange(4.0)[:, None, None] / 8)
    targets, sources = torch.tensor([4, 5]), torch.tensor([5, 7])
    followers.copy_blocks({9: 3})
    followers.move_slots(targets, sources)
    for cache in caches:
        assert bool((cache[:, :, 9] == cache[:, :, 3]).all())
        slots = cache.flatten(2, 3)[0, 0, :, 0, 0]
        assert slots[4:8].tolist() == [1 + 1 / 8, 1 + 3 / 8, 1 + 2 / 8, 1 + 3 / 8]


def test_mixed_embeddings_reach_all_ranks(group: Callable[[str, int], Group], llama: PreparedModel) -> None:
    sampling = SamplingParams(1, decoding=SuperposedDecoding(3))
    engines = EngineWithModel(whole(llama)), group("llama", 2).engine()
    for engine in engines:
        engine.submit("mixed", LONG, 8, sampling=sampling)
        engine.run()
    assert engines[0].drafts["mixed"].drafts == engines[1].drafts["mixed"].drafts


def test_a_batch_is_the_same_on_the_other_side() -> None:
    batch = replace(
        batch_of(LONG),
        rope_lens=torch.arange(60),
        rope_positions=torch.arange(180).view(3, 60),
        tree_masks={0: np.eye(60, dtype=np.bool_)},
    )
    found = unpack(pack(batch))
    for name in ForwardBatch.__dataclass_fields__:
        ours, theirs = getattr(batch, name), getattr(found, name)
        if isinstance(ours, torch.Tensor):
            assert torch.equal(ours, theirs)
        elif isinstance(ours, np.ndarray):
            assert np.array_equal(ours, theirs)
        elif name == "tree_masks":
            assert np.array_equal(ours[0], theirs[0])
        else:
            assert ours is theirs is None


@pytest.mark.parametrize("degree", [2, 4])
def test_kv_that_one_process_computed_serves_a_group_and_back(
    group: Callable[[str, int], Group], llama: PreparedModel, degree: int
) -> None:
    model = whole(llama)
    cache = torch.full(model.kv_cache_shape(64, 4), float("nan"))
    first = model.forward(batch_of(LONG), cache)[-1:].argmax(dim=1)
    made = group("llama", degree)
    made.engine()
    pool = made.placed.pool
    one = HostPool(cache, pool.layout)
    span = KvSpan(tuple(range(15)), 0, 60, 0, pool.layout.num_layers, 0, 2)
    payload = memoryview(bytearray(span_bytes(span, pool.layout)))
    one.read(span, payload)
    pool.write(span, payload, "float32")
    after = replace(
        batch_of((int(first),)),
        positions=torch.tensor([60]),
        slots=torch.tensor([60]),
        block_tables=np.arange(16, dtype=np.int32)[None],
        context_lens=np.array([61]),
    )
    assert made.placed.forward is not None
    expected, found = model.forward(after, cache), made.placed.forward(after)
    assert (found - expected).abs().max() < FP32_ERROR * expected.abs().max()
    span = replace(span, block_ids=tuple(range(16)), num_tokens=61)
    read = memoryview(bytearray(span_bytes(span, pool.layout)))
    pool.read(span, read)
    expected_kv = memoryview(bytearray(len(read)))
    one.read(span, expected_kv)
    theirs, ours = np.frombuffer(read, np.float32), np.frombuffer(expected_kv, np.float32)
    assert np.abs(theirs - ours).max() < FP32_ERROR * np.abs(ours).max()

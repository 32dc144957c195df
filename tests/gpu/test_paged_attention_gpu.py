"""Attention on a GPU against its reference, and within CUDA graphs.

python -m pytest tests/gpu/test_paged_attention_gpu.py -q
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import repeat

import pytest
import torch

from phasewise_kernels.paged_attention import cuda
from phasewise_kernels.paged_attention.cuda import NUM_SEMAPHORES, paged_attention_cuda
from tests.support.triton_checks import chunks
from tests.support.triton_checks import paged_attention as checks
from tests.support.triton_checks.interpreter import checks_of
from tests.support.triton_checks.paged_attention import Case, Inputs, assert_case, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here"),
]
BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
DECODE = ((1, 1000), (1, 5000), (1, 17), (1, 1), (1, 64))
CHUNKS = ((1, 1000), (700, 2000), (1000, 1000), (1, 17), (9, 300))
#: Few tiles over much: their contexts are cut.
LATE = ((1, 1000), (150, 9000), (40, 6000), (70, 70))

LARGE_CASES = (
    Case(DECODE, num_kv_heads=8, group=4, head_dim=128, block_size=16, dtype=BF16),
    Case(DECODE, num_kv_heads=8, group=4, head_dim=128, block_size=16, dtype=BF16, kv_dtype=FP8),
    Case(DECODE, group=16, head_dim=128, block_size=16, dtype=BF16, num_padding=3),
    Case(DECODE, group=8, head_dim=64, block_size=32, dtype=FP16, window=500),
    Case(DECODE, group=7, head_dim=96, block_size=16, dtype=FP16, is_interleaved=True),
    Case(DECODE, group=4, head_dim=256, block_size=64, dtype=BF16),
    Case(DECODE, group=4, head_dim=256, block_size=16),
    Case(((1, 100_000),), num_kv_heads=1, group=16, head_dim=128, block_size=16, dtype=BF16),
    Case(tuple((1, 1 + 37 * i) for i in range(200)), group=4, head_dim=64, block_size=16, dtype=BF16),
    # More outputs than multiprocessors, which then have two programs each.
    Case(
        tuple((1, 1 + 137 * i) for i in range(24)),
        num_kv_heads=8,
        group=4,
        head_dim=128,
        block_size=16,
        dtype=BF16,
    ),
    Case(((4, 1000), (16, 3000), (1, 17)), group=4, head_dim=128, block_size=16, dtype=BF16),
    Case(CHUNKS, group=4, head_dim=128, block_size=16, dtype=BF16),
    Case(CHUNKS, group=4, head_dim=128, block_size=16, dtype=BF16, kv_dtype=FP8),
    Case(CHUNKS, group=4, head_dim=256, block_size=16, dtype=FP16, window=300),
    Case(CHUNKS, group=3, head_dim=64, block_size=16, dtype=FP16),
    Case(CHUNKS, group=4, head_dim=96, block_size=32, dtype=BF16),
    Case(((1, 900), (60, 2000), (30, 1000)), group=4, head_dim=64, block_size=16, dtype=FP16, trees=(1, 2)),
    Case(((1, 900), (16, 2000), (13, 900)), head_dim=96, block_size=16, dtype=FP16, trees=(1, 2), window=100),
    Case(((3, 100), (1, 300), (40, 200)), group=4, head_dim=256, block_size=16),
    Case(LATE, num_kv_heads=8, group=4, head_dim=128, block_size=16, dtype=BF16),
    Case(LATE, group=4, head_dim=128, block_size=16, dtype=BF16, kv_dtype=FP8, num_padding=2),
    Case(LATE, group=3, head_dim=64, block_size=16, dtype=FP16, window=3000),
    Case(LATE, group=4, head_dim=256, block_size=16, dtype=BF16),
    Case(LATE, group=8, head_dim=96, block_size=32, dtype=FP16, is_interleaved=True),
    Case(((1, 900), (60, 9000), (30, 5000)), group=4, head_dim=64, block_size=16, dtype=FP16, trees=(1, 2)),
)


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """All kernels, side by side."""

    def compiled(case: Case, call: Callable[[Inputs], torch.Tensor]) -> None:
        torch.cuda.set_device(0)
        call(case.on("cuda"))

    with ThreadPoolExecutor(12) as executor:
        list(executor.map(compiled, (*checks.CASES, *LARGE_CASES), repeat(run)))
        list(executor.map(compiled, checks.CASES, repeat(checks.run_cut_if_long)))
    torch.cuda.synchronize()


@pytest.mark.parametrize(
    "check",
    [check for module in (checks, chunks) for check in checks_of(module.__name__).values()],
    ids=lambda check: check.__name__,
)
def test_the_kernels_equal_their_references(check: Callable[[str], None]) -> None:
    check("cuda")


@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_large_cases(case: Case) -> None:
    assert_case(case, "cuda")


def set_lengths(inputs: Inputs, others: Inputs) -> None:
    """What a replayed step writes into the static tensors of its graph."""
    inputs.query.copy_(others.query)
    inputs.k_cache.copy_(others.k_cache)
    inputs.v_cache.copy_(others.v_cache)
    width = others.batch.block_tables.shape[1]
    inputs.batch.block_tables[:, :width].copy_(others.batch.block_tables)
    inputs.batch.context_lens.copy_(others.batch.context_lens)


@pytest.mark.parametrize("own_semaphores", [True, False])
def test_a_cuda_graph_is_replayed_with_other_lengths(own_semaphores: bool) -> None:
    lengths = ((1, 4000), (1, 900), (1, 1), (1, 77), (1, 3000), (1, 3000))
    shape = {"num_kv_heads": 8, "group": 4, "head_dim": 128, "block_size": 16, "dtype": BF16}
    captured = Case(lengths, **shape).on("cuda")  # type: ignore[arg-type]
    if own_semaphores:
        semaphores = torch.zeros(NUM_SEMAPHORES, dtype=torch.int32, device="cuda")
        captured.batch = replace(captured.batch, semaphores=semaphores)
    out = captured.poisoned_out()
    caches = captured.k_cache, captured.v_cache
    paged_attention_cuda(captured.query, *caches, captured.batch, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        paged_attention_cuda(captured.query, *caches, captured.batch, out=out)
    for seed, others in enumerate(
        (lengths[::-1], ((1, 4000), (1, 1), (1, 1), (1, 3000), (1, 980), (1, 2977)))
    ):
        # As many blocks, so that the caches are as large.
        case = Case(others, seed=seed, **shape)  # type: ignore[arg-type]
        inputs = case.on("cuda")
        spare = captured.k_cache.shape[0] - inputs.k_cache.shape[0]
        for name in ("k_cache", "v_cache"):
            cache = getattr(inputs, name)
            padding = torch.full((max(spare, 0), *cache.shape[1:]), float("nan"), dtype=BF16, device="cuda")
            setattr(inputs, name, torch.cat((cache, padding)))
        set_lengths(captured, inputs)
        for _ in range(3):
            out.fill_(float("nan"))
            graph.replay()
            inputs.check(out, inputs.expected_dense())
    # Padding: sequences without a token.
    captured.batch.context_lens[1:3] = 0
    out.fill_(float("nan"))
    graph.replay()
    assert out[1:3].isnan().all()
    assert not out[3:].isnan().any()


def test_a_cuda_graph_of_chunks_is_replayed_with_contexts_cut_and_whole() -> None:
    shape = {"num_kv_heads": 8, "group": 4, "head_dim": 128, "block_size": 16, "dtype": BF16}
    captured = Case(((200, 9000), (1, 700), (56, 300)), **shape).on("cuda")  # type: ignore[arg-type]
    out = captured.poisoned_out()
    caches = captured.k_cache, captured.v_cache
    paged_attention_cuda(captured.query, *caches, captured.batch, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        paged_attention_cuda(captured.query, *caches, captured.batch, out=out)
    for lengths in (
        ((200, 9000), (1, 700), (56, 300)),
        ((200, 300), (1, 17), (56, 56)),
        ((30, 7000), (1, 17), (226, 2700)),
    ):
        inputs = Case(lengths, seed=1, **shape).on("cuda")  # type: ignore[arg-type]
        num_blocks = inputs.k_cache.shape[0]
        captured.query.copy_(inputs.query)
        for cache, other in zip(caches, (inputs.k_cache, inputs.v_cache), strict=True):
            cache[:num_blocks].copy_(other)
        captured.batch.block_tables[:, : inputs.batch.block_tables.shape[1]].copy_(inputs.batch.block_tables)
        captured.batch.context_lens.copy_(inputs.batch.context_lens)
        captured.batch.query_starts.copy_(inputs.batch.query_starts)
        expected = inputs.expected_dense()
        for _ in range(3):
            out.fill_(float("nan"))
            graph.replay()
            inputs.check(out, expected)
    checks.assert_semaphores_are_reset()


@pytest.mark.parametrize("lengths", [((1, 20_000), (1, 70), (1, 5000)), ((70, 20_000), (1, 70), (40, 5000))])
def test_many_launches_in_a_row_agree_bit_for_bit(lengths: tuple[tuple[int, int], ...]) -> None:
    inputs = Case(lengths, group=4, head_dim=128, block_size=16, dtype=BF16).on("cuda")
    first = run(inputs)
    outputs = [run(inputs) for _ in range(500)]
    assert all(torch.equal(output, first) for output in outputs)
    checks.assert_semaphores_are_reset()


def test_the_first_call_in_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Case(((1, 40),), dtype=FP16).on("cuda")
    run(inputs)
    monkeypatch.setattr(cuda, "_own_semaphores", {})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inputs.query.add_(1)
        with pytest.raises(RuntimeError, match="must not be captured"):
            paged_attention_cuda(inputs.query, inputs.k_cache, inputs.v_cache, inputs.batch)
    torch.cuda.synchronize()
    run(inputs)

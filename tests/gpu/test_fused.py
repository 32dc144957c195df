"""The small and the KV-moving kernels on a GPU, against their references, and within CUDA graphs.

python -m pytest tests/gpu/test_fused.py -q
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from phasewise_kernels.kv_codec.reference import PageCodec, encode_reference
from phasewise_kernels.quantised_attention.op import CODECS, HEAD_DIMS, quantised_attention
from phasewise_kernels.rms_norm.op import rms_norm
from phasewise_kernels.rope_write.op import rope_write
from phasewise_kernels.sample.op import sample
from phasewise_kernels.swiglu.op import swiglu
from tests.support.triton_checks import codecs, quantised, sampling, small_ops
from tests.support.triton_checks.interpreter import checks_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here"),
]
#: What inputs of these dtypes hold is made anew for each replay.
FRESH = (torch.float32, torch.bfloat16, torch.float16)


def all_checks() -> list[object]:
    """Each check of each module."""
    modules = (small_ops, codecs, quantised, sampling)
    return [
        pytest.param(check, id=f"{module.__name__.rpartition('.')[2]}-{name}")
        for module in modules
        for name, check in checks_of(module.__name__).items()
    ]


@pytest.mark.parametrize("check", all_checks())
def test_the_kernels_equal_their_references(check: Callable[[str], None]) -> None:
    check("cuda")


def assert_replays(work: Callable[[], tuple[torch.Tensor, ...]], inputs: list[torch.Tensor]) -> None:
    """What a CUDA graph of `work` computes of fresh inputs is what `work` computes of them."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = work()
    for _ in range(3):
        # Options of a draw, which are fp64, stay as they are.
        fresh = [x.clone() if x.dtype not in FRESH else torch.randn_like(x) for x in inputs]
        for x, new in zip(inputs, fresh, strict=True):
            x.copy_(new)
        for output in outputs:
            output.fill_(float("nan") if output.is_floating_point() else -7)
        graph.replay()
        found = [output.clone() for output in outputs]
        for x, new in zip(inputs, fresh, strict=True):
            x.copy_(new)
        for actual, expected in zip(found, work(), strict=True):
            assert torch.equal(actual, expected)


def test_small_ops_replay_in_a_cuda_graph() -> None:
    rows, added = (torch.randn(5, 576, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight = torch.randn(576, device="cuda", dtype=torch.bfloat16)
    assert_replays(lambda: (rms_norm(rows, weight, 1e-5, added=added),), [rows, added, weight])
    gate_up = torch.randn(5, 3072, device="cuda", dtype=torch.bfloat16)
    assert_replays(lambda: (swiglu(gate_up),), [gate_up])
    heads = torch.randn(5, 15, 64, device="cuda", dtype=torch.bfloat16)
    angles = torch.randn(5, 1, 64, device="cuda")
    slots = torch.tensor([3, 9, 0, -1, -1], device="cuda")
    caches = [torch.zeros(2, 8, 3, 64, device="cuda", dtype=torch.bfloat16) for _ in "kv"]
    assert_replays(
        lambda: (rope_write(heads, (angles.cos(), angles.sin()), slots, *caches),), [heads, angles, slots]
    )


def test_the_draw_replays_in_a_cuda_graph() -> None:
    logits = torch.randn(len(sampling.OPTIONS), 3000, device="cuda") * 3
    given = sampling.arguments(list(sampling.OPTIONS), "cuda", np.random.default_rng(0))
    assert_replays(lambda: (sample(logits, **given),), [logits, *given.values()])


def packed_attention_arguments(codec: PageCodec, head_dim: int) -> tuple[Any, ...]:
    """Of two sequences, for the op."""
    pages = encode_reference(torch.randn(8, 2, 64, 2, head_dim), codec).cuda()
    query = torch.randn(2, 8, head_dim, device="cuda", dtype=torch.bfloat16)
    tail = tuple(torch.randn(2, 64, 2, head_dim, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    table = torch.tensor([[0, 1, 7, 5, 4, 6], [3, 2, 0, 0, 0, 0]], dtype=torch.int32, device="cuda")
    lens = torch.tensor([386, 64], dtype=torch.int32, device="cuda")
    return query, pages, table, lens, tail


@pytest.mark.parametrize("codec", CODECS)
def test_attention_over_packed_pages_replays_in_a_cuda_graph(codec: PageCodec) -> None:
    query, pages, table, lens, tail = packed_attention_arguments(codec, 64)
    assert_replays(
        lambda: (quantised_attention(query, pages, table, lens, tail, codec=codec),),
        [query, *tail, table, lens],
    )


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("codec", CODECS)
def test_packed_codes_are_cut_bit_for_bit_as_plain_arithmetic_cuts_them(
    codec: PageCodec, head_dim: int
) -> None:
    from phasewise_kernels.quantised_attention import triton_kernel

    arguments = packed_attention_arguments(codec, head_dim)
    actual, expected = (
        triton_kernel.attend(*arguments, codec, num_sms=4, is_plain=is_plain) for is_plain in (False, True)
    )
    assert torch.equal(actual, expected)

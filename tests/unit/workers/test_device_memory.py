"""How much of a GPU's memory is taken for KV."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.device_engine import ENGINE, TINY
from tests.support.picture_models import IDEFICS3
from workers.api import WeightDtype
from workers.device.memory import (
    CONTEXT_BYTES,
    SAMPLER_ROW_BYTES,
    GpuMemory,
    kv_cache_bytes,
    layout_bytes,
    step_bytes,
)

GIB = 2**30
AUTO = replace(ENGINE, kv_cache_bytes=0)


def test_what_is_left_of_the_share_is_taken() -> None:
    # Its weights.
    memory = GpuMemory(60 * GIB, 80 * GIB, 20 * GIB)
    assert memory.left_of(0.9) == 52 * GIB
    assert kv_cache_bytes(memory, replace(AUTO, gpu_memory_fraction=0.9), 2 * GIB) == 50 * GIB
    assert kv_cache_bytes(memory, replace(AUTO, gpu_memory_fraction=0.25), 2 * GIB) < 0


def test_what_others_hold_of_a_share_is_told() -> None:
    memory = GpuMemory(20 * GIB, 80 * GIB, 16 * GIB)
    assert memory.held_of(0.45) == 0
    assert memory.held_of(0.9) == 36 * GIB


def test_a_size_that_is_named_is_kept() -> None:
    assert kv_cache_bytes(GpuMemory(0, GIB), replace(ENGINE, kv_cache_bytes=7), 0) == 7


def test_two_workers_of_one_gpu_have_a_share_each() -> None:
    first = GpuMemory(64 * GIB, 80 * GIB, 16 * GIB)
    assert first.left_of(0.45) == 20 * GIB
    # The first one has all of its share, and the second one its weights.
    second = GpuMemory(28 * GIB, 80 * GIB, 16 * GIB)
    assert second.left_of(0.45) == 20 * GIB
    assert second.left_of(0.9) == 28 * GIB


@given(st.integers(0, 40 * GIB), st.integers(0, 40 * GIB), st.floats(0.05, 1), st.integers(0, 4 * GIB))
def test_never_more_than_the_share_and_than_there_is(
    own: int, others: int, fraction: float, needed: int
) -> None:
    memory = GpuMemory(80 * GIB - own - others, 80 * GIB, own)
    taken = kv_cache_bytes(memory, replace(AUTO, gpu_memory_fraction=fraction), needed)
    assert taken <= 0 or own + needed + taken <= fraction * 80 * GIB
    assert taken <= 0 or needed + taken <= memory.free_bytes


def test_a_layout_of_the_sms_needs_what_an_h100_took() -> None:
    """Llama-3-8B's shape with 384 sequences and 2,048 tokens: 0.81 GB."""
    llama = replace(
        TINY,
        hidden_size=4096,
        intermediate_size=14336,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128256,
    )
    engine = replace(ENGINE, token_budget=2048, max_running_sequences=384)
    assert 0.81e9 < layout_bytes(llama, engine, 2) < 0.9e9
    # Larger steps are captured no more.
    assert layout_bytes(llama, replace(engine, token_budget=8192), 2) == layout_bytes(llama, engine, 2)


def test_steps_need_more_with_more_tokens_and_sequences() -> None:
    base = step_bytes(TINY, ENGINE, 2)
    assert base > CONTEXT_BYTES
    assert step_bytes(TINY, replace(ENGINE, token_budget=4096), 2) > base
    assert step_bytes(TINY, replace(ENGINE, max_running_sequences=64), 2) > base
    # Embeddings of the pictures of a captured step.
    assert step_bytes(replace(TINY, vision=IDEFICS3), ENGINE, 2) > base
    assert step_bytes(TINY, replace(ENGINE, weight_dtype=WeightDtype.FP8), 2) > base


def test_what_the_draw_of_a_row_takes_whatever_the_vocabulary_is_counted() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from phasewise_kernels.sample import levels, triton_kernel

    bins = 8 * levels.SUMS.value << triton_kernel.BITS
    candidates, state = 12 * triton_kernel.ROOM, 8 * levels.STATE.value
    assert bins + candidates + state <= SAMPLER_ROW_BYTES <= 1.1 * (bins + candidates + state)

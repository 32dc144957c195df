"""How much of a GPU's memory is taken for KV."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tests.support.device_engine import ENGINE, TINY
from workers.device.memory import CONTEXT_BYTES, GpuMemory, kv_cache_bytes, step_bytes

GIB = 2**30
AUTO = replace(ENGINE, kv_cache_bytes=0)


def test_what_is_left_of_the_share_is_taken() -> None:
    # 20 GiB are in use: weights, and other processes.
    memory = GpuMemory(60 * GIB, 80 * GIB)
    assert memory.left_of(0.9) == 52 * GIB
    assert kv_cache_bytes(memory, replace(AUTO, gpu_memory_fraction=0.9), 2 * GIB) == 50 * GIB
    assert kv_cache_bytes(memory, replace(AUTO, gpu_memory_fraction=0.25), 2 * GIB) < 0


def test_a_size_that_is_named_is_kept() -> None:
    assert kv_cache_bytes(GpuMemory(0, GIB), replace(ENGINE, kv_cache_bytes=7), 0) == 7


@given(st.integers(0, 80 * GIB), st.floats(0.05, 1), st.integers(0, 4 * GIB))
def test_never_more_than_the_share(used: int, fraction: float, needed: int) -> None:
    memory = GpuMemory(80 * GIB - used, 80 * GIB)
    taken = kv_cache_bytes(memory, replace(AUTO, gpu_memory_fraction=fraction), needed)
    assert taken <= 0 or used + needed + taken <= fraction * 80 * GIB


def test_steps_need_more_with_more_tokens_and_sequences() -> None:
    base = step_bytes(TINY, ENGINE, 2)
    assert base > CONTEXT_BYTES
    assert step_bytes(TINY, replace(ENGINE, token_budget=4096), 2) > base
    assert step_bytes(TINY, replace(ENGINE, max_running_sequences=64), 2) > base

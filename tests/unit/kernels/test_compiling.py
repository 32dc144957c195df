"""Which attention kernels are compiled ahead."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phasewise_kernels.paged_attention import compiling
from phasewise_kernels.paged_attention.compiling import StepShape, compile_attention, step_shapes
from phasewise_kernels.paged_attention.cuda import CudaAttentionBatch
from tests.support.waiting import BOUND_S


@given(
    st.integers(1, 1024),
    st.sampled_from((1, 2, 3, 4, 5, 7, 8, 16, 32, 64)),
    st.floats(0, 1),
    st.integers(1, 3000),
    st.booleans(),
)
def test_no_step_needs_another_kernel(
    max_sequences: int, group: int, part: float, query_len: int, has_tree: bool
) -> None:
    known = frozenset().union(*(shape.kernels(group) for shape in step_shapes(max_sequences, group)))
    step = StepShape(max(1, round(part * max_sequences)), query_len, has_tree)
    assert step.kernels(group) <= known


def test_kernels_are_few() -> None:
    """Each takes seconds."""
    assert len(step_shapes(8, 4)) == 11
    assert len(step_shapes(256, 4)) == 16
    assert len(step_shapes(256, 1)) == 20


@pytest.mark.parametrize("windows", [(0, 0), (128, 128), (0, 128, 0)])
def test_all_are_computed_once_and_an_error_is_raised(
    windows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    k_cache = torch.zeros(3, 16, 2, 8)
    asked: list[tuple[StepShape, bool]] = []
    told: list[float] = []
    may_go_on = threading.Event()
    may_go_on.set()

    def attend(
        query: torch.Tensor, _k: object, _v: object, batch: CudaAttentionBatch, *, window: int
    ) -> None:
        assert query.shape == (batch.num_tokens, 8, 8)
        assert not batch.context_lens.any()
        shape = StepShape(len(batch.context_lens), batch.max_query_len, batch.tree_masks is not None)
        asked.append((shape, window > 0))
        if len(asked) > 2:
            assert may_go_on.wait(BOUND_S)
        if batch.max_query_len == 3 and is_broken:
            raise ValueError("broken")

    monkeypatch.setattr(compiling, "paged_attention_cuda", attend)
    monkeypatch.setattr(torch.cuda, "device", lambda _device: torch.inference_mode())
    options = {"num_heads": 8, "dtype": torch.bfloat16, "windows": windows, "max_sequences": 100}

    def stop(_done: float) -> None:
        raise InterruptedError

    class Threads(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            may_go_on.set()
            super().shutdown(wait)

    is_broken = False
    compile_attention(k_cache, k_cache, progress=told.append, **options)  # type: ignore[arg-type]
    shapes = step_shapes(100, 4)
    assert sorted(asked, key=str) == sorted(
        ((shape, has_window) for shape in shapes for has_window in {window > 0 for window in windows}),
        key=str,
    )
    assert told == sorted(told)
    assert told[-1] == 1
    asked.clear()
    # As a worker that is told to stop while it loads, when two are done. Those that have begun end when no other one can begin.
    may_go_on.clear()
    monkeypatch.setattr(compiling, "ThreadPoolExecutor", Threads)
    monkeypatch.setattr(compiling, "MAX_THREADS", 3)
    with pytest.raises(InterruptedError):
        compile_attention(k_cache, k_cache, progress=stop, **options)  # type: ignore[arg-type]
    assert len(asked) <= 2 + 3 < len(shapes)
    is_broken = True
    with pytest.raises(ValueError, match="broken"):
        compile_attention(k_cache, k_cache, progress=told.append, **options)  # type: ignore[arg-type]

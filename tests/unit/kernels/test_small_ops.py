"""Norm, gate, and rotation with the write into the cache: by our kernels and by torch, against their specification."""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phasewise_kernels import jit
from phasewise_kernels import threads as kernel_threads
from phasewise_kernels.rms_norm.op import rms_norm
from phasewise_kernels.rms_norm.reference import rms_norm_reference
from phasewise_kernels.rope_write.op import rope_write
from phasewise_kernels.rope_write.reference import rope_write_reference
from phasewise_kernels.swiglu.op import swiglu
from phasewise_kernels.swiglu.reference import swiglu_reference
from phasewise_kernels.testing import SMALL_OP_TOLERANCE, assert_close, poison_empty

OPS = ("rms_norm", "rope_write", "swiglu")
EPS = 1e-5


@pytest.fixture(params=["kernel", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    for op in OPS:
        if name == "torch":
            monkeypatch.setitem(jit._loaded, f"phasewise_kernels.{op}.kernel", None)
        else:
            assert jit.load(f"phasewise_kernels.{op}.kernel") is not None
    return name


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of torch's threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def angles(num_tokens: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    half = random(num_tokens, 1, head_dim // 2, seed=3)
    both = torch.cat((half, half), dim=-1)
    return both.cos(), both.sin()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("has_added", [False, True])
@pytest.mark.parametrize("size", [1, 7, 64, 576])
@pytest.mark.parametrize("num_rows", [0, 1, 3, 40])
def test_rms_norm_equals_the_reference(num_rows: int, size: int, has_added: bool) -> None:
    rows, weight = random(num_rows, size), random(size, seed=1)
    added = random(num_rows, size, seed=2) if has_added else None
    total, expected = rms_norm_reference(rows, weight, EPS, added)
    actual = rms_norm(rows, weight, EPS, added=added)
    assert_close(actual, expected, SMALL_OP_TOLERANCE)
    assert torch.equal(rows, total)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("size", [1, 5, 16, 1536])
@pytest.mark.parametrize("num_rows", [0, 1, 3, 40])
def test_swiglu_equals_the_reference(num_rows: int, size: int) -> None:
    gate_up = random(num_rows, 2 * size) * 4
    assert_close(swiglu(gate_up), swiglu_reference(gate_up), SMALL_OP_TOLERANCE)


@pytest.mark.usefixtures("way")
def test_swiglu_of_large_gates_neither_overflows_nor_loses_the_sign() -> None:
    gate = torch.tensor([[-1e30, -200.0, -88.0, -30.0, 0.0, 30.0, 200.0, 1e30]])
    gate_up = torch.cat((gate, torch.ones_like(gate)), dim=1)
    actual = swiglu(gate_up)
    assert_close(actual[:, 1:], swiglu_reference(gate_up)[:, 1:], SMALL_OP_TOLERANCE)
    assert not actual.isnan().any()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("is_rotated", [True, False])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (3, 1), (9, 3), (4, 4)])
@pytest.mark.parametrize("head_dim", [2, 64, 96])
@pytest.mark.parametrize("num_tokens", [1, 17])
def test_rope_write_equals_the_reference_and_writes_nothing_else(
    num_tokens: int, head_dim: int, num_heads: int, num_kv_heads: int, is_rotated: bool
) -> None:
    heads = random(num_tokens, num_heads + 2 * num_kv_heads, head_dim)
    cos, sin = angles(num_tokens, head_dim)
    slots = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:num_tokens]
    shape = (5, 8, num_kv_heads, head_dim)
    caches, expected_caches = [poison_empty(shape) for _ in "kv"], [poison_empty(shape) for _ in "kv"]
    turn = (cos, sin) if is_rotated else (None, None)
    expected = rope_write_reference(heads, *turn, slots, *expected_caches)
    actual = rope_write(heads, (cos, sin), slots, *caches, is_rotated=is_rotated)
    assert_close(actual.contiguous(), expected.contiguous(), SMALL_OP_TOLERANCE)
    for cache, expected_cache in zip(caches, expected_caches, strict=True):
        assert torch.equal(cache.isnan(), expected_cache.isnan())
        assert_close(cache.nan_to_num(), expected_cache.nan_to_num(), SMALL_OP_TOLERANCE)


@settings(max_examples=30, deadline=None)
@given(num_rows=st.integers(0, 9), size=st.integers(1, 300), scale=st.floats(1e-3, 1e3))
def test_odd_sizes_and_scales(num_rows: int, size: int, scale: float) -> None:
    rows, weight = random(num_rows, size) * scale, random(size, seed=1)
    _, expected = rms_norm_reference(rows, weight, EPS)
    assert_close(rms_norm(rows, weight, EPS), expected, SMALL_OP_TOLERANCE)
    gate_up = random(num_rows, 2 * size) * min(scale, 20)
    assert_close(swiglu(gate_up), swiglu_reference(gate_up), SMALL_OP_TOLERANCE)


def a_norm() -> torch.Tensor:
    rows = random(37, 96)
    normed = rms_norm(rows, random(96, seed=1), EPS, added=random(37, 96, seed=2))
    return torch.cat((rows, normed))


def a_gate() -> torch.Tensor:
    return swiglu(random(37, 96))


def a_write() -> torch.Tensor:
    caches = [torch.zeros(5, 8, 2, 16) for _ in "kv"]
    query = rope_write(random(37, 10, 16), angles(37, 16), torch.arange(37), *caches)
    return torch.cat([part.flatten() for part in (query, *caches)])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("work", [a_norm, a_gate, a_write])
def test_the_number_of_threads_changes_no_bit(
    work: Callable[[], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_threads, "MIN_SHARED_BYTES", 0)
    outputs = []
    for num_threads in (1, 2, 3, 5):
        torch.set_num_threads(num_threads)
        outputs.append(work())
    assert all(torch.equal(outputs[0], output) for output in outputs)

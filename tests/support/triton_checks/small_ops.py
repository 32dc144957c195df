"""Norm, gate, and rotation with the write, on a GPU or interpreted, against their specification."""

from collections.abc import Callable
from importlib import import_module
from itertools import product
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phasewise_kernels.kv_int4.op import PACKED_DTYPE, unpack
from phasewise_kernels.kv_int4.rows import row_bytes
from phasewise_kernels.rms_norm import op as rms_norm_op
from phasewise_kernels.rms_norm.reference import rms_norm_reference
from phasewise_kernels.rope_write import op as rope_write_op
from phasewise_kernels.rope_write.reference import rope_write_reference
from phasewise_kernels.swiglu import op as swiglu_op
from phasewise_kernels.swiglu.reference import swiglu_reference
from phasewise_kernels.testing import SMALL_OP_TOLERANCES, TURNED_TOLERANCES, assert_close, poisoned_memory

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5
Heads = tuple[int, int, int]
#: Query heads, KV heads, head_dim.
PACKED_HEADS: tuple[Heads, ...] = ((1, 1, 32), (9, 3, 64), (32, 8, 128), (2, 2, 256))
HEADS: tuple[Heads, ...] = ((1, 1, 2), (9, 3, 64), (4, 4, 96), (3, 1, 80), (32, 8, 128))


def way(op: Any, name: str, device: str) -> Callable[..., torch.Tensor]:
    """The op itself on a GPU, else what it launches there."""
    module = op if device != "cpu" else import_module(f"phasewise_kernels.{name}.triton_kernel")
    return getattr(module, name)


def random(
    *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1, device: str = "cpu"
) -> torch.Tensor:
    """Fresh normal numbers."""
    return (torch.randn(shape) * scale).to(dtype).to(device)


def a_norm(
    num_rows: int, size: int, dtype: torch.dtype, has_added: bool, device: str, scale: float = 1
) -> None:
    """One norm against the reference."""
    rows = random(num_rows, size, dtype=dtype, scale=scale, device=device)
    weight = random(size, dtype=dtype, device=device)
    added = random(num_rows, size, dtype=dtype, scale=scale, device=device) if has_added else None
    total, expected = rms_norm_reference(rows, weight, EPS, added)
    with poisoned_memory():
        actual = way(rms_norm_op, "rms_norm", device)(rows, weight, EPS, added=added)
    assert_close(actual, expected, SMALL_OP_TOLERANCES[dtype])
    assert torch.equal(rows, total)


def a_gate(num_rows: int, size: int, dtype: torch.dtype, device: str, scale: float = 4) -> None:
    """One gate against the reference."""
    gate_up = random(num_rows, 2 * size, dtype=dtype, scale=scale, device=device)
    expected = swiglu_reference(gate_up)
    with poisoned_memory():
        actual = way(swiglu_op, "swiglu", device)(gate_up)
    assert_close(actual, expected, SMALL_OP_TOLERANCES[dtype])


def written(
    num_tokens: int,
    heads: Heads,
    dtype: torch.dtype,
    caches: list[torch.Tensor],
    expected_caches: list[torch.Tensor],
    is_rotated: bool,
    device: str,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Into both pairs of caches, by the op and by its reference: the two queries, and the slots, of which every third is none."""
    num_heads, num_kv_heads, head_dim = heads
    x = random(num_tokens, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype, scale=scale, device=device)
    half = random(num_tokens, 1, head_dim // 2, device=device)
    both = torch.cat((half, half), dim=-1)
    turn = both.cos(), both.sin()
    slots = torch.randperm(40)[:num_tokens]
    slots[2::3] = -1
    slots = slots.to(device)
    expected = rope_write_reference(x, *(turn if is_rotated else (None, None)), slots, *expected_caches)
    with poisoned_memory():
        actual = way(rope_write_op, "rope_write", device)(x, turn, slots, *caches, is_rotated=is_rotated)
    return actual, expected, slots


def a_write(
    num_tokens: int,
    heads: Heads,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    is_rotated: bool,
    device: str,
    scale: float = 1,
) -> None:
    """One rotation and write, every third token without a slot; nothing but its slots is written."""
    shape = (5, 8, heads[1], heads[2])
    caches, expected_caches = (
        [torch.full(shape, float("nan"), device=device).to(cache_dtype) for _ in "kv"] for _ in range(2)
    )
    actual, expected, _ = written(
        num_tokens, heads, dtype, caches, expected_caches, is_rotated, device, scale
    )
    assert_close(actual, expected.contiguous(), SMALL_OP_TOLERANCES[dtype])
    for cache, wanted, is_exact in zip(caches, expected_caches, (not is_rotated, True), strict=True):
        found, wanted = cache.float(), wanted.float()
        assert torch.equal(found.isnan(), wanted.isnan())
        found, wanted = found.nan_to_num(), wanted.nan_to_num()
        if is_exact:
            assert torch.equal(found, wanted)
        else:
            assert_close(found, wanted, SMALL_OP_TOLERANCES[cache_dtype])


def a_packed_write(
    num_tokens: int,
    heads: Heads,
    dtype: torch.dtype,
    is_rotated: bool,
    device: str,
    scale: float = 1,
) -> None:
    """The same into caches in four bits: a code may be its neighbour where float32 errors move a number across the border."""
    _, num_kv_heads, head_dim = heads
    shape = (5, 8, num_kv_heads, row_bytes(head_dim))
    caches, expected_caches = (
        [torch.full(shape, 0xFF, dtype=PACKED_DTYPE, device=device) for _ in "kv"] for _ in range(2)
    )
    actual, expected, slots = written(
        num_tokens, heads, dtype, caches, expected_caches, is_rotated, device, scale
    )
    # The tolerance is for numbers near 1.
    unit = max(1.0, scale)
    assert_close(actual.float() / unit, expected.float() / unit, TURNED_TOLERANCES[dtype])
    # Nothing turns V.
    assert torch.equal(caches[1], expected_caches[1])
    found, wanted = (one[0].flatten(0, 1) for one in (caches, expected_caches))
    is_written = torch.zeros(len(found), dtype=torch.bool, device=device)
    is_written[slots[slots >= 0]] = True
    assert torch.equal(found[~is_written], wanted[~is_written])
    found, wanted = found[is_written], wanted[is_written]
    steps = wanted[..., head_dim // 2 :].clone().view(torch.float16).float()[..., :2]
    error = (unpack(found) - unpack(wanted)).abs().unflatten(-1, (-1, 2))
    assert (error <= steps[..., None, :] * 1.01 + 1e-6 * scale).all()
    is_other = (found != wanted)[..., : head_dim // 2]
    assert is_other.float().mean() < 0.01 or is_other.sum() < 3


def check_rms_norm(device: str) -> None:
    """Shapes that are no powers of two, one row, none."""
    for num_rows, size, dtype, has_added in product((0, 1, 3), (1, 7, 576, 4096), DTYPES, (False, True)):
        a_norm(num_rows, size, dtype, has_added, device)


def check_swiglu(device: str) -> None:
    """The same; and gates at which an exponential would overflow."""
    for num_rows, size, dtype in product((0, 1, 3), (1, 5, 1536, 2050), DTYPES):
        a_gate(num_rows, size, dtype, device)
    gate = torch.tensor([[-1e30, -200.0, -88.0, -30.0, 0.0, 30.0, 200.0, 1e30]], device=device)
    gate_up = torch.cat((gate, torch.ones_like(gate)), dim=1)
    actual = way(swiglu_op, "swiglu", device)(gate_up)
    assert_close(actual[:, 1:], swiglu_reference(gate_up)[:, 1:], SMALL_OP_TOLERANCES[torch.float32])
    assert not actual.isnan().any()


def check_rope_write(device: str) -> None:
    """Head sizes that are no powers of two, all dtypes of the cache, padding rows, no tokens."""
    for num_tokens, heads, is_rotated in product((0, 1, 17), HEADS, (True, False)):
        a_write(num_tokens, heads, torch.float32, torch.float32, is_rotated, device)
    for dtype, cache_dtype in product(DTYPES, (*DTYPES, torch.float8_e4m3fn)):
        a_write(7, (9, 3, 64), dtype, cache_dtype, True, device)
    # Beyond what float8_e4m3fn holds.
    a_write(7, (3, 1, 80), torch.bfloat16, torch.float8_e4m3fn, False, device, scale=400)


def check_write_in_four_bits(device: str) -> None:
    """All sizes of heads that there are, dtypes, padding rows, no tokens."""
    for num_tokens, heads, is_rotated in product((0, 1, 7), PACKED_HEADS, (True, False)):
        a_packed_write(num_tokens, heads, torch.float32, is_rotated, device)
    for dtype, scale in product(DTYPES, (1e-3, 1, 100)):
        a_packed_write(7, (9, 3, 64), dtype, True, device, scale)


def check_what_four_bits_cannot_hold(device: str) -> None:
    """NaN stays in its group of its row, numbers beyond fp16 saturate, and equal ones are exact."""
    x = torch.ones(1, 3, 32, device=device)
    x[0, 2, 3] = float("nan")
    x[0, 2, 0::2] = 1e30
    caches = [torch.zeros(1, 1, 1, row_bytes(32), dtype=PACKED_DTYPE, device=device) for _ in "kv"]
    angles, slots = torch.zeros(1, 1, 32, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    way(rope_write_op, "rope_write", device)(x, (angles, angles), slots, *caches, is_rotated=False)
    keys, values = (unpack(cache).flatten() for cache in caches)
    # A row of ones, turned: all of it in the first channel.
    assert abs(keys[0] - 32**0.5) <= 6 * 2**-11
    assert not keys[1:].any()
    assert values[1::2].isnan().all()
    assert (values[0::2] == 65024).all()


def check_what_float8_cannot_hold(device: str) -> None:
    """Infinity saturates, NaN stays, as in `block_copy`."""
    x = torch.tensor([[449.0, -1e30, float("inf"), float("nan")]] * 3, device=device).view(1, 3, 4)
    caches = [torch.zeros(1, 1, 1, 4, device=device).to(torch.float8_e4m3fn) for _ in "kv"]
    angles = torch.ones(1, 1, 4, device=device)
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    way(rope_write_op, "rope_write", device)(x, (angles, angles), slots, *caches, is_rotated=False)
    for cache in caches:
        assert cache.float().flatten()[:3].tolist() == [448, -448, 448]
        assert cache.float().flatten()[3].isnan()


def check_odd_shapes(device: str) -> None:
    """Whatever hypothesis thinks of."""
    dtypes = st.sampled_from(DTYPES)

    @settings(max_examples=25, deadline=None, database=None)
    @given(st.integers(0, 9), st.integers(1, 700), dtypes, st.booleans(), st.floats(1e-2, 1e2))
    def norms_and_gates(num_rows: int, size: int, dtype: torch.dtype, has_added: bool, scale: float) -> None:
        a_norm(num_rows, size, dtype, has_added, device, scale)
        a_gate(num_rows, size, dtype, device, min(scale, 5))

    @settings(max_examples=10, deadline=None, database=None)
    @given(st.integers(0, 40), st.integers(1, 4), st.integers(1, 4), st.integers(4, 7), dtypes, st.booleans())
    def packed_writes(
        num_tokens: int, group: int, num_kv_heads: int, log_dim: int, dtype: torch.dtype, is_rotated: bool
    ) -> None:
        heads = (group * num_kv_heads, num_kv_heads, 2**log_dim)
        a_packed_write(num_tokens, heads, dtype, is_rotated, device)

    @settings(max_examples=25, deadline=None, database=None)
    @given(
        st.integers(0, 40), st.integers(1, 4), st.integers(1, 4), st.integers(1, 70), dtypes, st.booleans()
    )
    def writes(
        num_tokens: int, group: int, num_kv_heads: int, half: int, dtype: torch.dtype, is_rotated: bool
    ) -> None:
        heads = (group * num_kv_heads, num_kv_heads, 2 * half)
        a_write(num_tokens, heads, dtype, dtype, is_rotated, device)

    norms_and_gates()
    writes()
    packed_writes()

"""Rows to fp8, and products with weights in fp8, on a GPU or interpreted, against their specification."""

from importlib import import_module
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phasewise_kernels.fp8_linear.op import MAX_FEW_ROWS, Fp8Linear
from phasewise_kernels.fp8_linear.reference import (
    few_rows_reference,
    fp8_linear_reference,
    quantise_reference,
)
from phasewise_kernels.swiglu.reference import swiglu_reference
from phasewise_kernels.testing import poisoned_memory

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: (out_size, in_size): fewer and more than a program has, and sizes that are no multiple of its.
SHAPES = ((16, 16), (48, 4112), (96, 576))
#: Of the norm: fp32 sums, and one rounding.
TOLERANCES = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 3e-6}


def kernels() -> Any:
    return import_module("phasewise_kernels.fp8_linear.triton_kernel")


def rows_equal(rows: torch.Tensor, device: str) -> None:
    """To the bit."""
    numbers, scales = quantise_reference(rows)
    with poisoned_memory():
        found_numbers, found_scales = kernels().quantise_rows(rows.to(device))
    assert found_numbers.shape == rows.shape
    assert found_scales.shape == (len(rows), 1)
    found = found_numbers.cpu()
    assert torch.equal(found.float().isnan(), numbers.float().isnan())
    is_number = ~numbers.float().isnan()
    assert torch.equal(found.view(torch.uint8)[is_number], numbers.view(torch.uint8)[is_number])
    assert torch.equal(found_scales.cpu(), scales)


def check_rows(device: str) -> None:
    """One row, none, sizes that are no powers of two, and every dtype."""
    for num_rows, size in ((0, 16), (1, 1), (3, 576), (2, 4096), (5, 1040)):
        for dtype in DTYPES:
            rows_equal(torch.randn(num_rows, size).to(dtype), device)


def check_odd_rows(device: str) -> None:
    """All zero, tiny, huge, and one number that is far beyond the others."""
    outlier = torch.randn(1, 100)
    outlier[0, 7] = 3e4
    for rows in (torch.zeros(2, 32), torch.randn(2, 32) * 1e-30, torch.randn(2, 32) * 1e30, outlier):
        rows_equal(rows, device)


def check_any_rows(device: str) -> None:
    """Whatever hypothesis thinks of."""

    @settings(max_examples=25, deadline=None, database=None)
    @given(st.integers(0, 5), st.integers(1, 300), st.sampled_from(DTYPES), st.floats(1e-3, 1e3))
    def rows(num_rows: int, size: int, dtype: torch.dtype, scale: float) -> None:
        rows_equal((torch.randn(num_rows, size) * scale).to(dtype), device)

    rows()


def check_gated_rows(device: str) -> None:
    """Of silu(gate) * up: but for numbers at the border between two of fp8, as quantising it in fp64 gives."""
    for num_rows, size in ((0, 16), (1, 1), (3, 576), (2, 4112)):
        for dtype in DTYPES:
            gate_up = (torch.randn(num_rows, 2 * size) * 3).to(dtype)
            numbers, scales = quantise_reference(swiglu_reference(gate_up.double()))
            with poisoned_memory():
                found_numbers, found_scales = kernels().quantise_gated(gate_up.to(device))
            torch.testing.assert_close(found_scales.cpu(), scales, rtol=1e-5, atol=0)
            found, expected = found_numbers.cpu().float(), numbers.float()
            # One step of e4m3 is 2**-3 of a number at most, and 2**-9.
            assert ((found - expected).abs() <= 2**-3 * expected.abs() + 2**-9).all()
            assert (found != expected).float().sum() <= 1e-3 * found.numel()


def check_few_rows(device: str) -> None:
    """Every number of rows, with and without a bias; nothing beside the outputs is written."""
    for out_size, in_size in SHAPES:
        weight, scales = quantise_reference(torch.randn(out_size, in_size) * in_size**-0.5)
        for num_rows in range(1, MAX_FEW_ROWS + 1):
            for dtype, tolerance in TOLERANCES.items():
                rows = torch.randn(num_rows, in_size).to(dtype)
                for bias in (None, torch.randn(out_size).to(dtype)):
                    expected = few_rows_reference(rows, weight, scales[:, 0], bias).double()
                    with poisoned_memory():
                        found = kernels().linear_of_rows(
                            rows.to(device),
                            weight.to(device),
                            scales[:, 0].contiguous().to(device),
                            None if bias is None else bias.to(device),
                        )
                    assert found.shape == (num_rows, out_size)
                    assert found.dtype is dtype
                    error = (found.cpu().double() - expected).norm() / expected.norm()
                    assert error < tolerance, (out_size, in_size, num_rows, dtype, bias is not None, error)


def check_linear(device: str) -> None:
    """The op, on a GPU with bfloat16 rows and its own products: fast sums are off by a part of what bfloat16 rounds off."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for out_size, in_size in SHAPES[1:]:
        weight, scales = quantise_reference(torch.randn(out_size, in_size) * in_size**-0.5)
        for num_rows in (0, 1, MAX_FEW_ROWS, MAX_FEW_ROWS + 1, 17, 130):
            rows = torch.randn(num_rows, in_size).to(dtype)
            for bias in (None, torch.randn(out_size).to(dtype)):
                linear = Fp8Linear(
                    weight.to(device),
                    scales[:, 0].contiguous().to(device),
                    None if bias is None else bias.to(device),
                )
                reference = few_rows_reference if num_rows <= MAX_FEW_ROWS else fp8_linear_reference
                expected = reference(rows, weight, scales[:, 0], bias).double()
                found = linear(rows.to(device)).cpu().double()
                assert found.shape == (num_rows, out_size)
                if num_rows:
                    error = float((found - expected).norm() / expected.norm())
                    print(f"{num_rows} x {in_size} x {out_size}: relative error {error:.1e}")
                    assert error < (3e-6 if device == "cpu" else 1e-2)

"""Fp8 of rows and weights on a CPU, bit by bit where it can be, and what a product loses by it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phasewise_kernels.fp8_linear.op import MAX_FEW_ROWS, Fp8Linear, quantise_rows
from phasewise_kernels.fp8_linear.reference import E4M3_MAX, few_rows_reference, fp8_linear_reference
from phasewise_kernels.swiglu.op import swiglu


@given(st.integers(0, 6), st.integers(1, 70), st.floats(1e-6, 1e6), st.integers(0, 2**32))
def test_each_number_is_rounded_to_four_bits(num_rows: int, size: int, scale: float, seed: int) -> None:
    rows = torch.randn(num_rows, size, generator=torch.Generator().manual_seed(seed)) * scale
    numbers, scales = quantise_rows(rows)
    assert numbers.dtype is torch.float8_e4m3fn
    assert scales.shape == (num_rows, 1)
    error = (numbers.float() * scales - rows).abs()
    # By 2**-4 of itself, or, where e4m3 has steps of 2**-9, by half of one; the division may round too.
    assert (error <= 1.0001 * torch.maximum(rows.abs() * 2**-4, scales * 2**-10)).all()
    if num_rows:
        assert (numbers.float().abs().amax(dim=1) == E4M3_MAX).all()


def test_rows_are_scaled_on_their_own() -> None:
    rows = torch.tensor([[1.0, -2.0], [1e4, 5e3], [0.0, 0.0]])
    numbers, scales = quantise_rows(rows)
    assert numbers.float().tolist() == [[224, -448], [448, 224], [0, 0]]
    torch.testing.assert_close(scales[:2, 0], torch.tensor([2 / 448, 1e4 / 448]))
    assert scales[2, 0] > 0


def test_a_number_that_is_none_stays_in_its_row() -> None:
    numbers, scales = quantise_rows(torch.tensor([[1.0, float("nan")], [1.0, 2.0]]))
    assert not (numbers.float() * scales).isfinite()[0].any()
    assert (numbers.float() * scales).isfinite()[1].all()


@pytest.mark.parametrize("num_rows", [0, 1, MAX_FEW_ROWS, MAX_FEW_ROWS + 1, 40])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_is_that_of_the_specification(num_rows: int, has_bias: bool) -> None:
    weight, scales = quantise_rows(torch.randn(48, 64) / 8)
    bias = torch.randn(48) if has_bias else None
    rows = torch.randn(num_rows, 64)
    reference = few_rows_reference if num_rows <= MAX_FEW_ROWS else fp8_linear_reference
    expected = reference(rows, weight, scales[:, 0], bias)
    torch.testing.assert_close(Fp8Linear(weight, scales[:, 0], bias)(rows), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_rows", [0, 2, 40])
def test_a_gate_comes_before_its_projection(num_rows: int) -> None:
    weight, scales = quantise_rows(torch.randn(48, 64) / 8)
    gate_up, linear = torch.randn(num_rows, 128), Fp8Linear(weight, scales[:, 0])
    assert torch.equal(linear.gated(gate_up), linear(swiglu(gate_up)))


@pytest.mark.parametrize(("num_rows", "most"), [(2, 0.03), (64, 0.045)])
def test_what_a_product_loses(num_rows: int, most: float) -> None:
    """A number rounded to four bits is off by 2.6 % in the root mean square: one factor of a product, or both."""
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(n, 1024, generator=generator) for n in (num_rows, 512))
    numbers, scales = quantise_rows(weight)
    exact = rows @ weight.t()
    error = (Fp8Linear(numbers, scales[:, 0])(rows) - exact).norm() / exact.norm()
    assert most / 2 < error < most


@pytest.mark.parametrize("shape", [(24, 32), (32, 24)])
def test_other_sizes_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="both must be multiples of 16"):
        Fp8Linear(torch.zeros(shape).to(torch.float8_e4m3fn), torch.ones(shape[0]))

"""Projections of every dtype, by our kernel and by torch alone, against their specification."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phasewise_kernels import jit
from phasewise_kernels import threads as kernel_threads
from phasewise_kernels.linear.op import DTYPES, Linear, padded_rows, quantise
from phasewise_kernels.linear.reference import linear_reference
from phasewise_kernels.testing import LINEAR_TOLERANCES, assert_close

NUM_ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 11, 16, 17, 40)


@pytest.fixture(params=["kernel", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of few rows."""
    name: str = request.param
    if name == "torch":
        monkeypatch.setitem(jit._loaded, jit.KERNEL_MODULES[0], None)
    else:
        assert jit.load(jit.KERNEL_MODULES[0]) is not None
    return name


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of torch's threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def inputs(num_rows: int, in_size: int, out_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, weight, bias."""
    generator = torch.Generator().manual_seed(num_rows)
    return (
        torch.randn(num_rows, in_size, generator=generator),
        torch.randn(out_size, in_size, generator=generator) / in_size**0.5,
        torch.randn(out_size, generator=generator),
    )


def kept(weight: torch.Tensor, dtype: str) -> torch.Tensor:
    """The weight as that dtype keeps it, in float32."""
    if dtype == "int8":
        numbers, scales = quantise(weight)
        return numbers * scales[:, None]
    return weight.to(getattr(torch, dtype)).float()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_every_dtype_equals_the_reference(num_rows: int, dtype: str, has_bias: bool) -> None:
    rows, weight, bias = inputs(num_rows, 70, 37)
    linear = Linear(weight, bias if has_bias else None, dtype)
    expected = linear_reference(rows, kept(weight, dtype), bias if has_bias else None)
    assert_close(linear(rows), expected, LINEAR_TOLERANCES[dtype])


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(0, 20),
    in_size=st.integers(1, 200),
    out_size=st.integers(1, 90),
    dtype=st.sampled_from(DTYPES),
)
def test_odd_shapes(num_rows: int, in_size: int, out_size: int, dtype: str) -> None:
    rows, weight, bias = inputs(num_rows, in_size, out_size)
    expected = linear_reference(rows, kept(weight, dtype), bias)
    assert_close(Linear(weight, bias, dtype)(rows), expected, LINEAR_TOLERANCES[dtype])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 3, 8])
def test_any_number_of_threads_gives_the_same_bits(
    num_rows: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_threads, "MIN_SHARED_BYTES", 0)
    rows, weight, bias = inputs(num_rows, 96, 203)
    linear = Linear(weight, bias, dtype)
    outputs = []
    for num_threads in (1, 2, 3, 5):
        torch.set_num_threads(num_threads)
        outputs.append(linear(rows))
    assert all(torch.equal(outputs[0], output) for output in outputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_call_gives_the_same_bits(dtype: str) -> None:
    rows, weight, bias = inputs(16, 64, 50)
    linear = Linear(weight, bias, dtype)
    assert torch.equal(linear(rows), linear(rows))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weight_is_not_written(dtype: str) -> None:
    rows, weight, bias = inputs(4, 64, 50)
    before = weight.clone(), bias.clone()
    linear = Linear(weight, bias, dtype)
    for num_rows in (1, 4):
        linear(rows[:num_rows])
    linear(rows.repeat(10, 1))
    assert torch.equal(weight, before[0])
    assert torch.equal(bias, before[1])


def test_rows_that_are_a_view_are_read_right() -> None:
    rows, weight, bias = inputs(4, 64, 50)
    linear = Linear(weight, bias)
    view = torch.cat((rows, rows), dim=1)[:, :64]
    assert torch.equal(linear(view), linear(rows))


def test_int8_is_within_half_a_step_of_the_weight() -> None:
    _, weight, _ = inputs(1, 64, 50)
    weight[7] = 0
    numbers, scales = quantise(weight)
    assert ((numbers * scales[:, None] - weight).abs() <= scales[:, None] * 0.5001).all()


def test_memory_beyond_the_given_weight_is_told() -> None:
    rows, weight, _ = inputs(40, 64, 50)
    linear = Linear(weight)
    assert linear.memory_bytes == 0
    linear(rows)
    assert linear.memory_bytes in (0, weight.nbytes)
    assert Linear(weight, dtype="bfloat16").memory_bytes == weight.nbytes // 2
    assert Linear(weight, dtype="int8").memory_bytes == weight.nbytes // 4 + 50 * 4


def test_without_packing_no_copy_is_made() -> None:
    rows, weight, bias = inputs(40, 64, 50)
    linear = Linear(weight, bias, is_packed=False)
    assert_close(linear(rows), linear_reference(rows, weight, bias), LINEAR_TOLERANCES["float32"])
    assert linear.memory_bytes == 0


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype 'int4' is none of float32, bfloat16, int8"):
        Linear(torch.zeros(2, 2), dtype="int4")


def test_products_have_few_different_numbers_of_rows() -> None:
    sizes = [padded_rows(num_rows) for num_rows in range(1, 4097)]
    assert all(
        num_rows <= size <= max(num_rows + 15, num_rows * 1.07)
        for num_rows, size in enumerate(sizes, start=1)
    )
    assert len(set(sizes)) <= 5 * 16 + 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_rows", [9, 16, 17, 63])
def test_rows_that_fill_up_a_product_leave_no_trace(dtype: str, num_rows: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    weight, rows = torch.randn(40, 24, generator=generator), torch.randn(64, 24, generator=generator)
    linear = Linear(weight, torch.ones(40), dtype)
    result = linear(rows[:num_rows])
    assert result.shape == (num_rows, 40)
    assert result.is_contiguous()
    torch.testing.assert_close(result, linear(rows)[:num_rows], atol=1e-5, rtol=1e-5)

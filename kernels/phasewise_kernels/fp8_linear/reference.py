"""The specification of fp8: numbers of 8 bits (e4m3) and one fp32 scale for each row."""

import torch

#: Largest e4m3 number.
E4M3_MAX = 448.0
#: A row of nothing but zeros, or nearly, is scaled as if this were its largest number.
MIN_LARGEST = 1e-12


def quantise_reference(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 numbers and a scale per row, such that numbers * scale are the rows, each rounded to 4 bits.

    rows: [num_rows, size] of any float dtype; a NaN or infinity leaves a NaN in its row. Returns [num_rows, size] float8_e4m3fn, the
    largest of each row being E4M3_MAX, and [num_rows, 1] float32. Computed in float32.
    """
    values = rows.float()
    largest = values.abs().amax(dim=1, keepdim=True).clamp(min=MIN_LARGEST)
    # As a tensor: torch makes a product with a reciprocal of a division of a plain number.
    most = torch.tensor(E4M3_MAX, device=rows.device)
    numbers = (values * (most / largest)).clamp(-E4M3_MAX, E4M3_MAX)
    return numbers.to(torch.float8_e4m3fn), largest / most


def fp8_linear_reference(
    rows: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Rows are quantised, each with its scale, and multiplied in fp64; returns [num_rows, out_size] as rows.

    rows: [num_rows, in_size]; weight: [out_size, in_size] float8_e4m3fn; scales: [out_size] float32, of weight; bias: [out_size] or None.
    """
    numbers, row_scales = quantise_reference(rows)
    out = (numbers.double() @ weight.double().t()) * row_scales.double() * scales.double()
    return (out if bias is None else out + bias.double()).to(rows.dtype)


def few_rows_reference(
    rows: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The same with rows as they are."""
    out = (rows.double() @ weight.double().t()) * scales.double()
    return (out if bias is None else out + bias.double()).to(rows.dtype)

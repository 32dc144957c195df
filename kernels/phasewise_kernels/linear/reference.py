"""The specification of a projection."""

import torch


def linear_reference(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """rows @ weight.T + bias in fp64, as float32.

    rows: [num_rows, in_size]; weight: [out_size, in_size]; bias: [out_size] or None.
    """
    out = rows.double() @ weight.double().t()
    return (out if bias is None else out + bias.double()).float()

"""The specification of the norm."""

import torch


def rms_norm_reference(
    rows: torch.Tensor, weight: torch.Tensor, eps: float, added: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """rows + added, and that scaled to a root mean square of 1 per row, times weight; in fp64, in the dtype of rows.

    rows, added: [num_rows, size]; weight: [size]. Source: Zhang and Sennrich 2019.
    """
    total = rows if added is None else rows + added
    exact = total.double()
    normed = exact / (exact.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    return total, normed.to(rows.dtype)

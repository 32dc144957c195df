"""The specification of the gate."""

import torch


def swiglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """gate / (1 + exp(-gate)) * up in fp64, in the dtype of gate_up. gate_up: [num_rows, 2 * size], gate first.

    Source: Shazeer 2020, GLU Variants Improve Transformer.
    """
    gate, up = gate_up.double().chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)

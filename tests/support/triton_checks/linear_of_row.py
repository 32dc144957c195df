"""The product of one row on a GPU or interpreted, against fp64."""

import torch

from phasewise_kernels.linear.triton_kernel import linear_of_row

#: (out_size, in_size): fewer and more than a tile has, odd ones, and enough for each number of outputs of a program.
SHAPES = ((1, 1), (3, 5), (130, 1025), (8, 4096), (8193, 16), (65537, 4))
#: More outputs are more of the same programs, each of which takes the interpreter milliseconds.
MANY_OUTPUTS = 1000
#: Of the norm: products are exact in fp32, and the result is rounded once.
TOLERANCES = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}


def check_outputs(device: str) -> None:
    """Every shape and dtype, with and without a bias; on a CPU not the largest."""
    for out_size, in_size in SHAPES:
        if device == "cpu" and out_size > MANY_OUTPUTS:
            continue
        for dtype, tolerance in TOLERANCES.items():
            row = torch.randn(1, in_size).to(dtype)
            weight = (torch.randn(out_size, in_size) * in_size**-0.5).to(dtype)
            for bias in (None, torch.randn(out_size).to(dtype)):
                given = linear_of_row(
                    row.to(device), weight.to(device), None if bias is None else bias.to(device)
                ).cpu()
                expected = row.double() @ weight.double().T + (0 if bias is None else bias.double())
                error = (given.double() - expected).norm() / expected.norm()
                assert given.shape == (1, out_size)
                assert error < tolerance, (out_size, in_size, dtype, bias is not None, error)

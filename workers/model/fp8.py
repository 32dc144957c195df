"""The matrices of the layers in fp8: each as e4m3 numbers under its name and, beside it, a scale for each output.

Embedding, LM head, norms and biases stay what they are: they are a small part of what is read, and the logits follow from the LM head
directly. Scales are of outputs, as those of activations are of tokens, so that a product needs one multiplication by each.
"""

from collections.abc import Mapping, Sequence
from math import prod

import torch

from phasewise_kernels.fp8_linear.op import SIZE_STEP, quantise_rows
from workers.api import WeightDtype
from workers.loaded_shapes import SCALE_BYTES
from workers.model.config import ModelConfig
from workers.model.convert import output_shapes

MATRICES = frozenset({"qkv", "attention_out", "gate_up", "down"})
#: What is on its way to a device in fp32 at a time, in numbers.
PIECE_VALUES = 2**25


def is_matrix(name: str) -> bool:
    """Whether the tensor that `convert` names so is kept in fp8."""
    return name.rpartition(".")[2] in MATRICES


def scales_of(name: str) -> str:
    """What the scales of a matrix are called."""
    return f"{name}_scales"


def quantised(name: str, weight: torch.Tensor, device: torch.device) -> dict[str, torch.Tensor]:
    """A matrix and its scales, on `device`. weight: [out_size, in_size] of any float dtype, on any device."""
    numbers = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty(len(weight), device=device)
    step = max(1, PIECE_VALUES // weight.shape[1])
    for lo in range(0, len(weight), step):
        piece = weight[lo : lo + step].to(device).contiguous()
        found, found_scales = quantise_rows(piece)
        numbers[lo : lo + step] = found
        scales[lo : lo + step] = found_scales[:, 0]
    return {name: numbers, scales_of(name): scales}


def all_quantised(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a model, its matrices in fp8; what is not stays the same tensor."""
    found: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        found |= quantised(name, weight, weight.device) if is_matrix(name) else {name: weight}
    return found


def weights_bytes(shapes: Mapping[str, Sequence[int]], dtype: WeightDtype, value_bytes: int) -> int:
    """What tensors of these names and shapes take. value_bytes: of one number of those that are not in fp8."""
    num_bytes = 0
    for name, shape in shapes.items():
        if dtype is WeightDtype.FP8 and is_matrix(name):
            num_bytes += prod(shape) + shape[0] * SCALE_BYTES
        else:
            num_bytes += prod(shape) * value_bytes
    return num_bytes


def problem(config: ModelConfig) -> str | None:
    """Why the matrices of this model, or of a rank's part of it, cannot be multiplied in fp8; None when they can."""
    for name, shape in output_shapes(config).items():
        if is_matrix(name) and any(size % SIZE_STEP for size in shape):
            return f"{shape[0]} x {shape[1]} numbers in {name.rpartition('.')[2]}"
    return None

"""Numbers as codes of a few bits: groups with a scale and a minimum each, and codes as bytes."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Quantised:
    """codes: [..., num_groups, group_size, ...] uint8. scales and minima: fp16, 1 in place of the group_size."""

    codes: torch.Tensor
    scales: torch.Tensor
    minima: torch.Tensor

    def numbers(self) -> torch.Tensor:
        """What the codes stand for, fp32, in the shape of the codes."""
        return (self.codes.float() * self.scales.float()).add_(self.minima.float())


def quantise(x: torch.Tensor, bits: int, dim: int) -> Quantised:
    """2**bits levels for each group along `dim`, from its minimum to its maximum. x: fp32, magnitudes < 2**14.

    A group whose numbers are all equal gets the scale 0.
    """
    minima = x.amin(dim, keepdim=True)
    top_code = 2**bits - 1
    scales = ((x.amax(dim, keepdim=True) - minima) / top_code).half()
    minima = minima.half()
    # Codes fit the scale and the minimum as they are stored. Rounding these can put a number just outside.
    per_scale = torch.where(scales > 0, scales.float().reciprocal(), 0.0)
    codes = ((x - minima.float()).mul_(per_scale)).round_().clamp_(0, top_code)
    return Quantised(codes.to(torch.uint8), scales, minima)


def pack_bits(codes: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Several codes in a byte. codes: uint8 < 2**bits; bits: 1, 2, 4 or 8.

    `dim`, a multiple of 8 / bits, is cut into 8 / bits equal parts; a byte holds the codes at one place of all of them,
    the first part in its lowest bits. So whole parts are shifted, whatever `dim` is.
    """
    if bits == 8:
        return codes
    packed, *parts = codes.chunk(8 // bits, dim)
    packed = packed.clone()
    for number, part in enumerate(parts, 1):
        packed |= part << (number * bits)
    return packed


def unpack_bits(packed: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """The reverse of pack_bits."""
    if bits == 8:
        return packed
    mask = 2**bits - 1
    return torch.cat([(packed >> (number * bits)) & mask for number in range(8 // bits)], dim)

"""K and V of a token in four bits: what a row of a packed cache is, and how it is packed and unpacked, in plain torch on any device.

A row is one head of one token, `row_bytes(head_dim)` bytes:

    codes     [head_dim / 8] int32   8 channels in a word, from the lowest four bits on: 0, 2, 4, 6, 1, 3, 5, 7
    scales    [2] fp16               of the even channels, and of the odd ones
    minima    [2] fp16

so that a word of codes, those of scales and of minima have even channels in the lower half and odd ones in the upper: a GPU unpacks two
channels by three operations. A number is code * scale + minimum, the codes of a group lying evenly between its smallest and its largest. K is rotated before
it is packed: its outliers, which always are in the same few channels, are then spread over all of them. A rotation keeps products, so
that queries are rotated too and nothing is turned back. V has no such channels, and is packed as it is. A row depends on nothing
else: the next token's is written beside it, which groups over tokens do not allow.

`rope_write` packs where it rotates, and attention reads rows as they are, each within its kernel; what is here moves KV to and from
caches that hold it otherwise, and is what those are tested against.
Source: QuaRot (arXiv 2404.00456): KV in groups of each token with a scale and a minimum, K rotated after its position.
"""

import torch

from phasewise_kernels.kv_codec.reference import rotate
from phasewise_kernels.kv_int4.rows import SCALES_BYTES

#: Of packed caches, which are told by it.
PACKED_DTYPE = torch.uint8
_TOP = 15
#: Of numbers: fifteen steps from the least of them, with their scale rounded up, fp16 is not at its end.
_LARGEST = 65024.0


def head_dim_of(cache: torch.Tensor) -> int:
    """Channels of a head. cache: [..., head_dim], or [..., row_bytes] of a packed one."""
    return 2 * (cache.shape[-1] - SCALES_BYTES) if cache.dtype == PACKED_DTYPE else cache.shape[-1]


def turned(x: torch.Tensor) -> torch.Tensor:
    """x: [..., head_dim]. Each row times the Hadamard matrix over its root, in fp32: queries and keys of a packed cache. Its own reverse."""
    return rotate(x.float(), x.shape[-1])


def pack(x: torch.Tensor) -> torch.Tensor:
    """x: [..., head_dim] of any float dtype; keys are `turned` before. Returns [..., row_bytes] uint8, contiguous.

    Beyond 65024 numbers saturate. A group with a NaN becomes NaN.
    """
    groups = torch.stack((x[..., 0::2], x[..., 1::2]), -2).float().clamp(-_LARGEST, _LARGEST)
    low = groups.amin(-1, keepdim=True)
    scales = ((groups.amax(-1, keepdim=True) - low) / _TOP).half()
    minima = low.half()
    steps = (groups - minima.float()) / torch.where(scales == 0, 1.0, scales.float())
    codes = steps.round().clamp(0, _TOP).nan_to_num(0.0).to(torch.uint8)
    # [..., word, group, channel of it], as four bits each.
    codes = codes.view(*codes.shape[:-1], codes.shape[-1] // 4, 4).transpose(-2, -3)
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).flatten(-3)
    told = torch.cat((scales.squeeze(-1), minima.squeeze(-1)), -1).contiguous().view(torch.uint8)
    return torch.cat((packed, told), -1)


def unpack(rows: torch.Tensor) -> torch.Tensor:
    """The reverse. Returns [..., head_dim] fp32, contiguous; keys are still turned."""
    half = rows.shape[-1] - SCALES_BYTES
    codes = torch.stack((rows[..., :half] & _TOP, rows[..., :half] >> 4), -1)
    # [..., group, its channel]
    codes = codes.view(*rows.shape[:-1], half // 4, 2, 4).transpose(-2, -3).flatten(-2).float()
    # A copy: a number must begin at a multiple of its size.
    told = rows[..., half:].clone(memory_format=torch.contiguous_format).view(torch.float16).float()
    numbers: torch.Tensor = codes * told[..., :2, None] + told[..., 2:, None]
    return numbers.transpose(-1, -2).flatten(-2)


def values_of(cache: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """K or V of a cache as numbers of this dtype, [..., head_dim]; K of a packed one is turned."""
    return (unpack(cache) if cache.dtype == PACKED_DTYPE else cache).to(dtype)


def pack_kv(kv: torch.Tensor) -> torch.Tensor:
    """kv: [num_layers, 2 (K, V), ..., head_dim] of any float dtype, as other caches hold it; [num_layers, 2, ..., row_bytes] uint8."""
    return torch.stack((pack(turned(kv[:, 0])), pack(kv[:, 1])), 1)


def unpack_kv(rows: torch.Tensor) -> torch.Tensor:
    """The reverse: [num_layers, 2, ..., head_dim] fp32."""
    return torch.stack((turned(unpack(rows[:, 0])), unpack(rows[:, 1])), 1)

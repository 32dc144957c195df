"""KV as codes of 4 bits, after a rotation that spreads outliers over many channels.

A page, after its exponents, with B the block and head_dim = num_blocks * B:

    codes    [channel < head_dim / 2, K/V, head, token]: the low 4 bits are of this channel, the high 4 of this one plus
             head_dim / 2
    scales   [block, K/V, head, token] fp16
    minima   [block, K/V, head, token] fp16

Each token's block of B channels is multiplied by the Hadamard matrix of size B over sqrt(B), which is its own inverse,
and then quantised as one group. Attention has large numbers in a few channels of K; rotated, no channel is special.
Source: QuaRot (arXiv 2404.00456) for the rotation.
"""

import torch

from kvtransfer.codecs.codec import CodecId
from kvtransfer.codecs.paged import PagedCodec, Sections, bytes_of
from kvtransfer.codecs.quantise import Quantised, pack_bits, quantise, unpack_bits

BITS = 4
#: Channels that are rotated together and share a scale, at most.
MAX_BLOCK = 64


def block_of(head_dim: int) -> int:
    """The largest power of two that divides head_dim, at most MAX_BLOCK."""
    return min(head_dim & -head_dim, MAX_BLOCK)


def rotate(x: torch.Tensor, block: int) -> torch.Tensor:
    """x: [head_dim, ...] fp32, contiguous, overwritten. Each block of the first axis times its Hadamard matrix.

    Sums and differences of halves, then of halves of these: exactly the same for every column, however many there are,
    which a matrix product is not. Doing it twice gives x back, up to rounding.
    """
    other = torch.empty_like(x)
    half = block // 2
    while half:
        source, target = x.view(-1, 2, half, *x.shape[1:]), other.view(-1, 2, half, *x.shape[1:])
        torch.add(source[:, 0], source[:, 1], out=target[:, 0])
        torch.sub(source[:, 0], source[:, 1], out=target[:, 1])
        x, other = other, x
        half //= 2
    return x.mul_(block**-0.5)


def _body_bytes(num_tokens: int, num_heads: int, head_dim: int) -> int:
    per_token = head_dim // 2 + head_dim // block_of(head_dim) * 4
    return 2 * num_heads * num_tokens * per_token


def _encode(x: torch.Tensor) -> torch.Tensor:
    """See PagedCodec. Works on [head_dim, all else]: the rotation and the groups then run along the first axis."""
    num_pages, head_dim = x.shape[0], x.shape[-1]
    block = block_of(head_dim)
    rotated = rotate(x.view(-1, head_dim).t().contiguous(), block)
    found = quantise(rotated.view(head_dim // block, block, -1), BITS, dim=1)
    codes = pack_bits(found.codes.view(head_dim, -1), BITS, dim=0)
    sections = (codes, found.scales.squeeze(1), found.minima.squeeze(1))
    return torch.cat([bytes_of(part.view(len(part), num_pages, -1).transpose(0, 1)) for part in sections], 1)


def _decode(bodies: torch.Tensor, num_tokens: int, num_heads: int, head_dim: int) -> torch.Tensor:
    block, num_vectors = block_of(head_dim), 2 * num_heads * num_tokens
    sections = Sections(bodies)
    packed = sections.take(torch.uint8, head_dim // 2, num_vectors).transpose(0, 1).flatten(1)
    scales, minima = (
        sections.take(torch.float16, head_dim // block, num_vectors).transpose(0, 1).flatten(1)[:, None]
        for _ in range(2)
    )
    codes = unpack_bits(packed, BITS, dim=0).view(head_dim // block, block, -1)
    x = rotate(Quantised(codes, scales, minima).numbers().view(head_dim, -1), block)
    return x.t().contiguous().view(-1, 2, num_heads, num_tokens, head_dim)


INT4_HADAMARD = PagedCodec(CodecId.INT4_HADAMARD, _body_bytes, _encode, _decode)

"""KV as e4m3 floats of 8 bits (1 sign, 4 exponent, 3 fraction), with a scale for each token and head.

A page, after its exponents:

    numbers  [K/V, head, token, channel] e4m3, over their scale
    scales   [K/V, head, token] fp16

The scale puts the largest number of a token's head at 448, the largest that there is, so that this one is exact. In K a
few channels are often much larger than the others, and most of the product with a query comes from them. Without these
scales, which are 2 bytes of 66, the KL divergence is half as large again: benchmarks/kvtransfer/codec_quality.py has both.
"""

import torch

from kvtransfer.codecs.codec import CodecId
from kvtransfer.codecs.paged import PagedCodec, Sections, bytes_of

#: Largest e4m3 number.
E4M3_MAX = 448.0
#: fp16 has 8 exponents more below those of e4m3: the same bits stand for a number 2**8 times smaller.
FP16_FACTOR = 256.0
#: Of a scale: the smallest normal fp16 number.
MIN_SCALE = 2.0**-14


def _body_bytes(num_tokens: int, num_heads: int, head_dim: int) -> int:
    return 2 * num_heads * num_tokens * (head_dim + 2)


def _encode(x: torch.Tensor) -> torch.Tensor:
    """See PagedCodec."""
    largest = torch.maximum(x.amax(4, keepdim=True), -x.amin(4, keepdim=True))
    scales = (largest / E4M3_MAX).clamp_(min=MIN_SCALE).half()
    # A scale that was rounded down puts the largest number a little above E4M3_MAX, and still rounds it to that.
    numbers = x.mul_(scales.float().reciprocal()).to(torch.float8_e4m3fn)
    return torch.cat((bytes_of(numbers), bytes_of(scales)), 1)


def _decode(bodies: torch.Tensor, num_tokens: int, num_heads: int, head_dim: int) -> torch.Tensor:
    sections = Sections(bodies)
    packed = sections.take(torch.int8, 2, num_heads, num_tokens, head_dim)
    scales = sections.take(torch.float16, 2, num_heads, num_tokens, 1).float()
    return from_e4m3(packed).mul_(scales.mul_(FP16_FACTOR))


def from_e4m3(packed: torch.Tensor) -> torch.Tensor:
    """packed: bits of e4m3 as int8. Returns their numbers over FP16_FACTOR, fp32.

    Sign, exponent and fraction are moved to where fp16 has them: torch's own conversion is six times slower.
    """
    bits = (packed.to(torch.int16) << 7) & ~0x4000
    return bits.view(torch.float16).float()


FP8 = PagedCodec(CodecId.FP8, _body_bytes, _encode, _decode)

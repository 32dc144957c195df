"""KV as models have it, for tests of codecs."""

import torch

from kvtransfer.codecs.codec import Codec, PageShape


def realistic_kv(
    num_tokens: int, num_heads: int = 3, head_dim: int = 64, *, num_layers: int = 2, seed: int = 0
) -> torch.Tensor:
    """K with a few channels far from zero, V with a few large numbers anywhere; what is near in the text is alike."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    kv = normal(num_layers, 2, num_tokens, num_heads, head_dim)
    slow = normal(num_layers, 2, 1, num_heads, head_dim) + normal(num_layers, 2, num_tokens, num_heads, 1)
    kv += slow
    is_far = torch.rand((num_layers, 1, num_heads, head_dim), generator=generator) < 0.05
    kv[:, 0] += 12 * is_far * normal(num_layers, 1, num_heads, head_dim)
    is_large = torch.rand(kv.shape, generator=generator) < 0.01
    return kv + 8 * is_large * normal(*kv.shape)


def shape_of(kv: torch.Tensor) -> PageShape:
    """Of [num_layers, 2, num_tokens, num_heads, head_dim]."""
    return PageShape(kv.shape[0], kv.shape[2], kv.shape[3], kv.shape[4])


def packed(codec: Codec, kv: torch.Tensor) -> bytes:
    """What `pack` writes."""
    out = bytearray(codec.packed_bytes(shape_of(kv)))
    codec.pack(kv, memoryview(out))
    return bytes(out)


def round_trip(codec: Codec, kv: torch.Tensor) -> torch.Tensor:
    """What `unpack` makes of it."""
    return codec.unpack(memoryview(packed(codec, kv)), shape_of(kv))

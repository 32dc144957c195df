"""What a codec of KV is. Pure.

A codec packs one page: the K and V of some tokens in one layer, all heads given. Pages know nothing of each other, so
a chunk is a row of pages, and what was packed can be stored, sent and unpacked page by page.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class CodecId(IntEnum):
    """As it stands in a chunk's header; never used for another codec."""

    NONE = 0
    FP8 = 1
    INT4_HADAMARD = 2
    GEAR = 3
    GEAR_L = 4


#: Tokens of a page at most; the last one of a chunk may be shorter.
PAGE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class PageShape:
    """What is packed: [num_layers, 2 (K, V), num_tokens, num_heads, head_dim]."""

    num_layers: int
    num_tokens: int
    num_heads: int
    head_dim: int


class Codec(Protocol):
    """Packs and unpacks KV. The same input gives the same bytes on any machine of the same kind."""

    @property
    def id(self) -> CodecId:
        """Which codec it is."""
        ...

    def packed_bytes(self, shape: PageShape) -> int:
        """Bytes of `pack` for this shape, which do not depend on the values."""
        ...

    def pack(self, kv: "torch.Tensor", out: memoryview) -> None:
        """kv: [num_layers, 2, num_tokens, num_heads, head_dim] fp32, fp16, bf16 or e4m3, CPU. out: `packed_bytes` long.

        Tokens are packed in pages of PAGE_TOKENS from the first one on. NaN and infinity raise ValueError.
        """
        ...

    def unpack(self, packed: memoryview, shape: PageShape) -> "torch.Tensor":
        """The reverse, [num_layers, 2, num_tokens, num_heads, head_dim] fp32. Raises ValueError for another size."""
        ...

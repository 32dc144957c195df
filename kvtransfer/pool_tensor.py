"""Pools and payloads of KV as tensors."""

import torch

from kvtransfer.layout import INT4, KvLayout, check_dtype, head_bytes
from kvtransfer.pool import KvSpan
from phasewise_kernels.kv_int4.op import PACKED_DTYPE


def torch_dtype(name: str) -> torch.dtype:
    """name: a key of DTYPE_BITS; int4 is rows of bytes. Raises ValueError for another one."""
    check_dtype(name)
    dtype = PACKED_DTYPE if name == INT4 else getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def pool_shape(layout: KvLayout, num_blocks: int) -> tuple[int, int, int, int, int, int]:
    """Of the tensor of a pool."""
    width = _width(layout, layout.dtype)
    return (layout.num_layers, 2, num_blocks, layout.block_size, layout.num_heads, width)


def payload_tensor(payload: torch.Tensor, span: KvSpan, layout: KvLayout, dtype: str) -> torch.Tensor:
    """payload: [num_bytes] uint8 as it travels, in this dtype. A view, [num_layers, 2, num_tokens, num_heads, head_dim]."""
    shape = span.layer_hi - span.layer_lo, 2, span.num_tokens, span.head_hi - span.head_lo
    return payload.view(torch_dtype(dtype)).view(*shape, _width(layout, dtype))


def _width(layout: KvLayout, dtype: str) -> int:
    return head_bytes(dtype, layout.head_dim) // torch_dtype(dtype).itemsize

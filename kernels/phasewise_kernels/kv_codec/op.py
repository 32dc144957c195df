"""KV of some tokens of a pool as packed pages, as they travel, and back: packed and unpacked where it lies.

The bytes are those of docs/kv-codecs.md. On the CPU, and for a head_dim that is no power of two from 16 to 256, `reference.py`
runs on the device of the pool.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from phasewise_kernels.block_copy.reference import TokenRows, convert, gather, scatter
from phasewise_kernels.kv_codec import reference
from phasewise_kernels.kv_codec.reference import PAGE_TOKENS, PageCodec, decode_reference, encode_reference

HEAD_DIMS = (16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """pages: [num_layers, bytes of a layer] uint8. num_unusable: [1] int32, of heads of pages that hold NaN or infinity.

    Both are on the pool's device, and nobody has waited for them. Pages are of no use unless num_unusable is 0.
    """

    pages: torch.Tensor
    num_unusable: torch.Tensor


def encode_pages(source: TokenRows, codec: PageCodec) -> Packed:
    """Tokens in pages of PAGE_TOKENS from the first one on: [layer][page], the last page possibly shorter.

    `fp8` and `int4_hadamard` give the bytes that the CPU gives; of `gear` and `gear_l` the factors may differ in the last bits.
    Raises ValueError for a head_dim that is no multiple of 8.
    """
    _check(source)
    num_layers, _, num_tokens, num_heads, head_dim = source.shape
    device = source.kv_cache.device
    if not _is_by_kernel(source):
        kv = gather(source).float()
        bad = (~kv.isfinite()).any(dim=4).any(dim=2).sum().to(torch.int32).view(1)
        return Packed(encode_reference(kv.nan_to_num(0.0, 0.0, 0.0), codec), bad)
    num_bytes = reference.layer_bytes(codec, num_tokens, num_heads, head_dim)
    packed = torch.empty(num_layers, num_bytes, dtype=torch.uint8, device=device)
    num_unusable = torch.zeros(1, dtype=torch.int32, device=device)
    if packed.numel():
        launch(source, codec, packed, num_unusable)
    return Packed(packed, num_unusable)


def decode_pages(packed: torch.Tensor, target: TokenRows, codec: PageCodec) -> None:
    """The reverse, converted to the dtype of the pool. packed: [num_layers, bytes of a layer] uint8, contiguous.

    Raises ValueError for packed bytes of another size.
    """
    _check(target)
    num_layers, _, num_tokens, num_heads, head_dim = target.shape
    expected = (num_layers, reference.layer_bytes(codec, num_tokens, num_heads, head_dim))
    if packed.shape != expected:
        raise ValueError(f"packed pages are {list(packed.shape)} bytes, and should be {list(expected)}")
    if not packed.numel():
        return
    if _is_by_kernel(target):
        launch(target, codec, packed, None)
    else:
        kv = decode_reference(packed, codec, num_tokens, num_heads, head_dim)
        scatter(convert(kv, target.kv_cache.dtype), target)


def launch(
    rows: TokenRows, codec: PageCodec, packed: torch.Tensor, num_unusable: torch.Tensor | None
) -> None:
    """Pack `rows`, or, where num_unusable is None, unpack into them; on the current stream."""
    # Triton is there where torch has CUDA; nobody else pays for its import.
    from phasewise_kernels.kv_codec import gear_kernel, triton_kernel

    pool = rows.kv_cache
    num_layers, _, num_tokens, num_heads, head_dim = rows.shape
    num_pages = -(-num_tokens // PAGE_TOKENS)
    slots = torch.from_numpy(rows.slots)
    if pool.device.type != "cpu":
        # Page-locked, so that nothing waits for what runs on the stream.
        slots = slots.pin_memory().to(pool.device, non_blocking=True)
    extra: tuple[Any, ...] = ()
    shape: tuple[Any, ...] = (num_heads, head_dim)
    encode, decode = triton_kernel.encode_fp8_kernel, triton_kernel.decode_fp8_kernel
    if codec == "int4_hadamard":
        block = reference.block_of(head_dim)
        extra, shape = (block**-0.5,), (*shape, block, block.bit_length() - 1)
        encode, decode = triton_kernel.encode_int4_kernel, triton_kernel.decode_int4_kernel
    elif codec != "fp8":
        count, groups = reference.outlier_count(codec, head_dim), reference.groups_of(head_dim)
        shape = (*shape, codec == "gear", count, groups)
        encode, decode = gear_kernel.encode_gear_kernel, gear_kernel.decode_gear_kernel
        extra = () if num_unusable is None else (_starts(num_tokens % PAGE_TOKENS, head_dim, pool.device),)
    (decode if num_unusable is None else encode)[(num_layers * num_pages, 2 * num_heads)](
        pool,
        slots,
        packed,
        *(() if num_unusable is None else (num_unusable,)),
        num_tokens,
        num_pages,
        rows.layers[0],
        rows.heads[0],
        pool[0, 0].numel(),
        pool.shape[-2] * head_dim,
        packed.shape[1],
        reference.page_bytes(codec, PAGE_TOKENS, num_heads, head_dim),
        *extra,
        *shape,
        num_warps=8 if head_dim > 64 else 4,
        # The bytes are to be those of the CPU, which multiplies and adds one after the other.
        enable_fp_fusion=False,
    )


@cache
def _starts(num_rest: int, head_dim: int, device: torch.device) -> torch.Tensor:
    """Where the power iteration begins: for V of a full page and of the last, for K of both."""
    starts: list[torch.Tensor] = []
    for width, length in (
        (head_dim, head_dim),
        (head_dim, head_dim),
        (PAGE_TOKENS, PAGE_TOKENS),
        (PAGE_TOKENS, num_rest),
    ):
        is_short = len(starts) % 2 == 1
        rank = reference.RANK * num_rest // PAGE_TOKENS if is_short else reference.RANK
        padded = torch.zeros(reference.RANK * width)
        padded[: rank * length] = reference.start(rank, length).flatten()
        starts.append(padded)
    return torch.cat(starts).to(device)


def _is_by_kernel(rows: TokenRows) -> bool:
    return rows.kv_cache.device.type != "cpu" and rows.shape[4] in HEAD_DIMS


def _check(rows: TokenRows) -> None:
    if rows.shape[4] % 8:
        raise ValueError(f"head_dim {rows.shape[4]} is no multiple of 8: use no codec")

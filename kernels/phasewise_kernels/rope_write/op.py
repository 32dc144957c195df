"""What lies between the projection of Q, K and V and attention over the cache."""

import torch

from phasewise_kernels import jit
from phasewise_kernels.block_copy.reference import convert
from phasewise_kernels.kv_int4.op import PACKED_DTYPE, pack, turned
from phasewise_kernels.threads import run_ranges

_KERNEL = "phasewise_kernels.rope_write.kernel"


def rope_write(
    heads: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    is_rotated: bool = True,
) -> torch.Tensor:
    """Rotate the query and key heads, write keys and values into their slots, and return the query.

    heads: [num_tokens, num_heads + 2 * num_kv_heads, head_dim] float32, contiguous: queries, keys, values. rotation:
    cos and sin, each [num_tokens, 1, head_dim], whose halves are alike. slots: [num_tokens] int64, all different
    and within the cache, which is not checked. k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim],
    contiguous. is_rotated: False leaves queries and keys as they are.
    The caches may be float8_e4m3fn: rounded to nearest, saturating; or in four bits, [..., row_bytes(head_dim)] of `kv_int4/op.py`: the
    query that is returned is then turned as the keys are, and head_dim is a power of two. On a GPU heads may be bf16 or fp16 (the rotation is computed in
    float32); a slot below 0 is not written, as the rows have that fill up a CUDA graph. Nothing is waited for.
    Returns [num_tokens, num_heads, head_dim] as heads. Source: RoFormer (Su et al. 2021), section 3.4.2.
    """
    if heads.device.type != "cpu":
        assert heads.is_contiguous()
        assert k_cache.is_contiguous()
        assert v_cache.is_contiguous()
        # Triton is there where torch has CUDA; nobody else pays for its import.
        from phasewise_kernels.rope_write import triton_kernel

        return triton_kernel.rope_write(heads, rotation, slots, k_cache, v_cache, is_rotated=is_rotated)
    num_tokens, num_all, head_dim = heads.shape
    num_kv_heads = k_cache.shape[2]
    num_heads = num_all - 2 * num_kv_heads
    keys, values = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
    module = jit.load(_KERNEL) if k_cache.dtype is torch.float32 else None
    if module is None:
        # Query and key heads are neighbours, so one rotation serves both.
        query_key = heads[:, : num_heads + num_kv_heads]
        if is_rotated:
            query_key = _rotate(query_key.float(), *rotation)
        is_packed = keys.dtype == PACKED_DTYPE
        if is_packed:
            query_key = turned(query_key)
        # What is packed is rounded once.
        rounded = pack if is_packed else lambda x: convert(x.to(heads.dtype), keys.dtype)
        is_kept = slots >= 0
        keys[slots[is_kept]] = rounded(query_key[is_kept, num_heads:])
        values[slots[is_kept]] = rounded(heads[is_kept, num_heads + num_kv_heads :])
        return query_key[:, :num_heads].to(heads.dtype)
    assert heads.is_contiguous()
    assert k_cache.is_contiguous()
    assert v_cache.is_contiguous()
    query = torch.empty(num_tokens, num_heads, head_dim)
    cos, sin = rotation
    fixed = (
        heads.numpy(),
        cos.view(num_tokens, head_dim).numpy(),
        sin.view(num_tokens, head_dim).numpy(),
        slots.numpy(),
        query.numpy(),
        keys.numpy(),
        values.numpy(),
        is_rotated,
    )
    run_ranges(module.rope_write, fixed, num_tokens, heads.nbytes)
    return query


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin

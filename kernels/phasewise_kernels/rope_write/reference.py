"""The specification of rotation and write."""

import torch

from phasewise_kernels.kv_codec.reference import rotate
from phasewise_kernels.kv_int4.op import PACKED_DTYPE, pack


def rope_write_reference(
    heads: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> torch.Tensor:
    """Arguments as in the op; cos and sin are None for no rotation. Writes the caches and returns the query.

    Any dtypes: computed in fp64, rounded once; float8_e4m3fn saturates. A slot below 0 is not written. Caches in four bits get what
    `kv_int4/op.py` packs, and the query is turned with the keys.
    Source: RoFormer (Su et al. 2021), section 3.4.2, with the two dimensions of a pair half a head apart.
    """
    num_kv_heads, head_dim = k_cache.shape[2], heads.shape[2]
    num_rotated = heads.shape[1] - num_kv_heads
    rotated = heads[:, :num_rotated].double()
    half = head_dim // 2
    if cos is not None and sin is not None:
        for i in range(half):
            first, second = heads[:, :num_rotated, i].double(), heads[:, :num_rotated, half + i].double()
            c, s = cos[:, :, i].double(), sin[:, :, i].double()
            rotated[:, :, i] = first * c - second * s
            rotated[:, :, half + i] = second * c + first * s
    if k_cache.dtype == PACKED_DTYPE:
        rotated = rotate(rotated, head_dim)
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        block, offset = divmod(slot, k_cache.shape[1])
        k_cache[block, offset] = _rounded(rotated[token, num_rotated - num_kv_heads :], k_cache.dtype)
        v_cache[block, offset] = _rounded(heads[token, num_rotated:], v_cache.dtype)
    return rotated[:, : num_rotated - num_kv_heads].to(heads.dtype)


def _rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype == PACKED_DTYPE:
        return pack(x)
    return x.clamp(-448, 448).to(dtype) if dtype == torch.float8_e4m3fn else x.to(dtype)

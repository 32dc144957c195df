"""Copy of vectors of 16 bytes between two pools, and their checksum, in one pass over memory.

A plane is K or V of one layer. The vectors of the tokens of a plane, in the order of the wire, are cut into tiles:

    tile          0 .. tiles_per_plane - 1 of plane 0, then of plane 1, ...     shared out over all programs in turn
    vector        place among those of one plane: token * row_vectors + place in the token's row
    position      the same among those of all planes: what the checksum's coefficient is made of
    table         [where each plane begins in the source, in the target
                   | where the row of each token begins in a plane of the source, of the target]

int64, counted in vectors from the start of a pool. So blocks of any size on either side, any run of them and any
range of heads are one case. A program adds up what it read, and stores that once: no atomics, the same sum every time.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl

from phasewise_kernels.block_copy import reference

_F = TypeVar("_F", bound=Callable[..., Any])
_jit: Callable[[_F], Any] = triton.jit(do_not_specialize=["num_planes", "num_tokens"])

_FACTOR_0 = tl.constexpr(reference.WORD_FACTORS[0])
_FACTOR_1 = tl.constexpr(reference.WORD_FACTORS[1])
_FACTOR_2 = tl.constexpr(reference.WORD_FACTORS[2])
_FACTOR_3 = tl.constexpr(reference.WORD_FACTORS[3])
_GOLDEN = tl.constexpr(reference.GOLDEN)
_MIX_1 = tl.constexpr(reference.MIX_1)
_MIX_2 = tl.constexpr(reference.MIX_2)


@_jit
def _convert(x, place, is_inside):  # type: ignore[no-untyped-def]
    """To the nearest; beyond what float8_e4m3fn holds it saturates, and NaN stays NaN."""
    x = x.to(tl.float32)
    if place.dtype.element_ty == tl.float8e4nv:
        x = tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(place, x.to(place.dtype.element_ty), mask=is_inside)


@_jit
def block_copy_kernel(  # type: ignore[no-untyped-def] # Triton looks at annotations, and knows but its own
    source,
    target,
    table,
    partials,
    num_planes,
    num_tokens,
    row_vectors: tl.constexpr,
    tile_vectors: tl.constexpr,
    is_copied: tl.constexpr,
    is_checked: tl.constexpr,
    is_converted: tl.constexpr,
    source_numbers: tl.constexpr,
    target_numbers: tl.constexpr,
):
    """source, target: int32, 16-byte aligned. table: see above. partials: [programs] int64.

    is_converted: source and target are of their dtypes, of which a vector holds so many numbers. What is read for the
    checksum is then read once more as numbers, from the cache.
    """
    plane_vectors = num_tokens * row_vectors
    tiles_per_plane = tl.cdiv(plane_vectors, tile_vectors)
    source_planes = table
    target_planes = source_planes + num_planes
    source_rows = target_planes + num_planes
    target_rows = source_rows + num_tokens
    lanes = tl.arange(0, tile_vectors)
    words = tl.arange(0, 4)[None, :]
    if is_checked:
        factors = tl.full([1, 4], _FACTOR_0, tl.uint64)
        factors = tl.where(words == 1, tl.full([1, 4], _FACTOR_1, tl.uint64), factors)
        factors = tl.where(words == 2, tl.full([1, 4], _FACTOR_2, tl.uint64), factors)
        factors = tl.where(words == 3, tl.full([1, 4], _FACTOR_3, tl.uint64), factors)
        total = tl.zeros([tile_vectors], tl.uint64)
    for tile in range(tl.program_id(0), num_planes * tiles_per_plane, tl.num_programs(0)):
        plane = tile // tiles_per_plane
        vector = (tile - plane * tiles_per_plane) * tile_vectors + lanes
        is_inside = vector < plane_vectors
        token = vector // row_vectors
        in_row = vector - token * row_vectors
        row = tl.load(source_rows + token, mask=is_inside, other=0)
        place = tl.load(source_planes + plane) + row + in_row
        if is_converted:
            numbers = tl.arange(0, source_numbers)[None, :]
            x = tl.load(
                source + (place[:, None] * source_numbers + numbers), mask=is_inside[:, None], other=0.0
            )
            row = tl.load(target_rows + token, mask=is_inside, other=0)
            start = (tl.load(target_planes + plane) + row) * target_numbers + in_row * source_numbers
            _convert(x, target + (start[:, None] + numbers), is_inside[:, None])
        if is_checked or not is_converted:
            # [tile_vectors, 4]: each thread has all words of its vectors
            data = tl.load(
                source.to(tl.pointer_type(tl.int32)) + (place[:, None] * 4 + words),
                mask=is_inside[:, None],
                other=0,
            )
        if is_copied and not is_converted:
            row = tl.load(target_rows + token, mask=is_inside, other=0)
            place = tl.load(target_planes + plane) + row + in_row
            tl.store(target + (place[:, None] * 4 + words), data, mask=is_inside[:, None])
        if is_checked:
            position = plane.to(tl.int64) * plane_vectors + vector
            z = (position + 1).to(tl.uint64) * _GOLDEN
            z = (z ^ (z >> 30)) * _MIX_1
            z = (z ^ (z >> 27)) * _MIX_2
            z = (z ^ (z >> 31)) | 1
            unsigned = data.to(tl.uint32, bitcast=True).to(tl.uint64)
            total += z * tl.sum(unsigned * factors, axis=1)
    if is_checked:
        tl.store(partials + tl.program_id(0), tl.sum(total, axis=0).to(tl.int64, bitcast=True))


def launch(
    source: torch.Tensor,
    target: torch.Tensor | None,
    table: torch.Tensor,
    partials: torch.Tensor | None,
    *,
    num_planes: int,
    num_tokens: int,
    row_vectors: int,
    num_programs: int,
    tile_vectors: int,
    num_warps: int,
) -> None:
    """On the current stream. source, target: [n] int32, or both of their own dtypes, which differ; table: int64;
    partials: [num_programs] int64.
    """
    assert num_tokens * row_vectors < 2**31 - tile_vectors
    is_converted = target is not None and source.dtype != target.dtype
    block_copy_kernel[(num_programs,)](
        source,
        source if target is None else target,
        table,
        table if partials is None else partials,
        num_planes,
        num_tokens,
        row_vectors,
        tile_vectors,
        target is not None,
        partials is not None,
        is_converted,
        reference.VECTOR_BYTES // source.itemsize,
        1 if target is None else reference.VECTOR_BYTES // target.itemsize,
        num_warps=num_warps,
        num_stages=1,
    )

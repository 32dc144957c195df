"""KV of some tokens from one block pool to another on a GPU, with a checksum of what was read.

One kernel reads each vector of 16 bytes once, stores it, converted where the pools differ in dtype, and adds it to the
checksum. On the CPU, and for rows that are not whole vectors, `reference.py` runs; from or to rows in four bits it converts.
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch

from phasewise_kernels.block_copy import reference
from phasewise_kernels.block_copy.reference import VECTOR_BYTES, TokenRows, contiguous_rows
from phasewise_kernels.kv_int4.op import PACKED_DTYPE


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the kernel is cut up. programs_per_sm: that many share a streaming multiprocessor."""

    tile_vectors: int = 2048
    num_warps: int = 8
    programs_per_sm: int = 16


DEFAULT_TUNING = Tuning()


def block_copy(source: TokenRows, target: TokenRows) -> int:
    """Copy, converted where the dtypes differ, and wait for it; returns the checksum of what was read, < 2**64.

    Both have as many layers, tokens and heads, and lie on devices that reach each other. No two slots of the target
    are the same; source and target do not overlap. Raises ValueError when the shapes differ.
    """
    return checksum_of(start_block_copy(source, target))


def block_checksum(source: TokenRows) -> int:
    """What `block_copy` returns, without a copy."""
    return checksum_of(start_block_copy(source, None))


def checksum_of(partials: torch.Tensor) -> int:
    """Wait for what `start_block_copy` returned; the checksum, < 2**64. Of no bytes it is 0."""
    # On the device: 64 bits wrap, as the checksum does.
    return int(partials.sum().item()) % 2**64


def start_block_copy(
    source: TokenRows,
    target: TokenRows | None,
    *,
    is_checked: bool = True,
    tuning: Tuning = DEFAULT_TUNING,
) -> torch.Tensor:
    """Put the work on the current stream of the target's device; None as target reads only.

    Returns [n] int64 on that device, for `checksum_of`; empty when not checked. Source and target must stay
    as they are until then.
    """
    if target is not None and source.kv_shape != target.kv_shape:
        raise ValueError(f"the source is {list(source.kv_shape)} and the target {list(target.kv_shape)}")
    device = (source if target is None else target).kv_cache.device
    if 0 in source.shape or (target is None and not is_checked):
        return torch.empty(0, dtype=torch.int64, device=device)
    is_by_kernel = device.type != "cpu" and _is_in_vectors(source)
    if target is None:
        return _by_kernel(source, None, True, tuning) if is_by_kernel else _by_reference(source, None, True)
    dtypes = {source.kv_cache.dtype, target.kv_cache.dtype}
    if len(dtypes) > 1 and PACKED_DTYPE in dtypes:
        return _repacked(source, target, is_checked, tuning)
    if not (is_by_kernel and _is_in_vectors(target)):
        return _by_reference(source, target, is_checked)
    return _by_kernel(source, target, is_checked, tuning)


def _is_in_vectors(rows: TokenRows) -> bool:
    cache = rows.kv_cache
    head_bytes = cache.shape[-1] * cache.itemsize
    sizes = (rows.row_bytes, rows.heads[0] * head_bytes, cache.shape[-2] * head_bytes, cache.data_ptr())
    return all(size % VECTOR_BYTES == 0 for size in sizes)


def _repacked(source: TokenRows, target: TokenRows, is_checked: bool, tuning: Tuning) -> torch.Tensor:
    """From or to rows in four bits: first to the target's device as they are, then layer by layer, as numbers take many times the room."""
    kept = torch.empty(source.shape, dtype=source.kv_cache.dtype, device=target.kv_cache.device)
    partials = start_block_copy(source, contiguous_rows(kept), is_checked=is_checked, tuning=tuning)
    for i, layer in enumerate(range(*target.layers)):
        converted = reference.convert(kept[i : i + 1], target.kv_cache.dtype)
        reference.scatter(converted, replace(target, layers=(layer, layer + 1)))
    return partials


def _by_reference(source: TokenRows, target: TokenRows | None, is_checked: bool) -> torch.Tensor:
    kv = reference.gather(source)
    if target is not None:
        converted = reference.convert(kv, target.kv_cache.dtype)
        reference.scatter(converted.to(target.kv_cache.device), target)
    return reference.partial_checksums(kv) if is_checked else kv.new_empty(0, dtype=torch.int64)


def _by_kernel(source: TokenRows, target: TokenRows | None, is_checked: bool, tuning: Tuning) -> torch.Tensor:
    # Triton is there where torch has CUDA; nobody else pays for its import.
    from phasewise_kernels.block_copy import triton_kernel

    device = (source if target is None else target).kv_cache.device
    num_layers, _, num_tokens, *_ = source.shape
    row_vectors = source.row_bytes // VECTOR_BYTES
    num_tiles = 2 * num_layers * -(-num_tokens * row_vectors // tuning.tile_vectors)
    num_programs = min(num_tiles, _num_sms(device) * tuning.programs_per_sm)
    with torch.cuda.device(device):
        # Page-locked, so that nothing waits for what runs on the stream.
        table = torch.from_numpy(table_of(source, target)).pin_memory()
        partials = torch.empty(num_programs if is_checked else 0, dtype=torch.int64, device=device)
        is_converted = target is not None and target.kv_cache.dtype != source.kv_cache.dtype
        view = numbers if is_converted else words
        triton_kernel.launch(
            view(source),
            None if target is None else view(target),
            table.to(device, non_blocking=True),
            partials if is_checked else None,
            num_planes=2 * num_layers,
            num_tokens=num_tokens,
            row_vectors=row_vectors,
            num_programs=num_programs,
            tile_vectors=tuning.tile_vectors,
            num_warps=tuning.num_warps,
        )
    return partials


def table_of(source: TokenRows, target: TokenRows | None) -> np.ndarray:
    """As the kernel wants it, see there."""
    sides = (source, source if target is None else target)
    planes, rows = zip(*map(_places, sides), strict=True)
    return np.concatenate((*planes, *rows)).astype(np.int64, copy=False)


def _places(rows: TokenRows) -> tuple[np.ndarray, np.ndarray]:
    """Where planes begin, and rows within a plane, in vectors."""
    _, _, num_blocks, block_size, num_heads, head_dim = rows.kv_cache.shape
    head_bytes = head_dim * rows.kv_cache.itemsize
    slot_vectors = num_heads * head_bytes // VECTOR_BYTES
    plane_vectors = num_blocks * block_size * slot_vectors
    planes = np.arange(2 * rows.layers[0], 2 * rows.layers[1], dtype=np.int64)
    return planes * plane_vectors + rows.heads[0] * head_bytes // VECTOR_BYTES, rows.slots * slot_vectors


def words(rows: TokenRows) -> torch.Tensor:
    """The whole pool, as the kernel wants it."""
    return rows.kv_cache.view(-1).view(torch.int32)


def numbers(rows: TokenRows) -> torch.Tensor:
    """The whole pool, as the kernel wants it to convert."""
    return rows.kv_cache.view(-1)


@cache
def _num_sms(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)

"""Paged attention on an NVIDIA GPU, by Triton.

Sequences with few new tokens, those that decode, are read by `lean_triton.py`, at the rate of memory; those with many by
`chunk_triton.py`. A batch that has both is two launches of one call. Lengths and block tables stay on the device and
nothing waits for it, so a call can be captured in a CUDA graph and replayed with other lengths.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from phasewise_kernels.kv_int4.op import PACKED_DTYPE, head_dim_of

#: More rows than this, a row being a new token of a query head, are not a decode's.
MAX_LEAN_ROWS = 64
#: New tokens of a tree: bits of an int64.
MAX_TREE_TOKENS = 64
#: The kernels are compiled for so many sequences, or the next power of two: 32 lengths are summed up within a warp.
MIN_LEAN_SEQUENCES, MIN_CHUNK_SEQUENCES = 32, 64
#: The same of steps that are rare: of several rows of a sequence for the lean kernel, of trees for the other. Fewer kernels are compiled.
MIN_RARE_SEQUENCES = 256
#: The lean kernel needs three for each of its programs, the chunk kernel MAX_WAVES for each that runs at the same time.
NUM_SEMAPHORES = 1 << 14
#: Contexts of chunks are cut into so many pieces that each multiprocessor has this many at most.
MAX_WAVES = 4
#: A cut costs the time in which a program reads so many tokens, for each wave of pieces. A guess.
PART_TOKENS = 512
#: Of a part that are on their way at the same time when parts of chunks are merged.
MERGED_VALUES = 4096
#: Shared memory of the chunk kernel beside its queries and stages, at most.
SHARED_REST_BYTES = 3072
#: The only number of channels of `byte_tiles_triton.py`: four of each of 32 threads are a row of V.
BYTE_TILES_HEAD_DIM = 128
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class CudaAttentionBatch:
    """Who attends to what in one step. All tensors are on one device.

    Lengths on the device may change between replays of a CUDA graph; what the host knows are upper bounds then.
    """

    #: [num_sequences, max_blocks] int32, padded with anything.
    block_tables: torch.Tensor
    #: [num_sequences + 1] int32: the new tokens of sequence i, its last ones, are rows query_starts[i] to
    #: query_starts[i + 1] - 1 of the query.
    query_starts: torch.Tensor
    #: [num_sequences] int32: all tokens with the new ones. 0 is a row of padding: its output is not written.
    context_lens: torch.Tensor
    block_size: int
    num_tokens: int
    #: Most new tokens of a sequence; 1 is a batch that only decodes.
    max_query_len: int
    #: Most tokens of a sequence, for the launch's shape alone.
    max_context_len: int
    #: Fewest new tokens of a sequence, where the host knows more than 1.
    min_query_len: int = 1
    #: [num_tokens] int64: bit j of a row says whether it sees new token j of its sequence; 0 is a row that is not of
    #: a tree. A sequence with a tree has at most MAX_TREE_TOKENS new tokens, and each sees itself.
    tree_masks: torch.Tensor | None = None
    #: [NUM_SEMAPHORES] int32 zeros, for launches that may run at the same time as others; None are the device's own,
    #: for one stream at a time.
    semaphores: torch.Tensor | None = None
    #: Streaming multiprocessors that the launch may use; None is all of the device.
    num_sms: int | None = None
    #: Sequences with more new tokens than the lean kernel reads for, at most; None: as many as there can be.
    max_prompts: int | None = None


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a kernel is cut up. programs_per_sm: of the lean kernel, that share a streaming multiprocessor."""

    tile_tokens: int
    num_warps: int
    num_stages: int
    programs_per_sm: int = 1


def paged_attention_cuda(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: CudaAttentionBatch,
    *,
    window: int = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the new tokens of `batch`; the K and V of these are in the cache already.

    query: [num_tokens, num_heads, head_dim] fp16, bf16 or fp32; k_cache, v_cache: [num_blocks, block_size,
    num_kv_heads, head_dim], of the same dtype or float8_e4m3fn, with any strides but 1 in the last dimension, as
    `out` and query may have; or [..., row_bytes(head_dim)] of `kv_int4/op.py`, all strides multiples of 8, with queries that are turned. num_heads is a multiple of num_kv_heads. window: as in `reference.py`.
    Returns out, or a new tensor like query. Raises ValueError when shapes or dtypes do not fit.
    """
    _check(query, k_cache, v_cache, batch)
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    group = query.shape[1] // k_cache.shape[2]
    lean_len = lean_query_len(batch.max_query_len, group)
    if query.shape[0] and batch.min_query_len <= lean_len:
        lean_attention(query, k_cache, v_cache, batch, out, window=window, max_query_len=lean_len)
    if query.shape[0] and batch.max_query_len > lean_len:
        chunk_attention(query, k_cache, v_cache, batch, out, window=window, min_query_len=lean_len + 1)
    return out


def lean_query_len(max_query_len: int, group: int) -> int:
    """Most new tokens of a sequence that the lean kernel reads for: all, or what a tile of 16 rows has room for.

    As many as fill a power of two of rows, since each number is a kernel of its own.
    """
    num_rows = _power_of_two(max_query_len * group)
    return num_rows // group if num_rows <= MAX_LEAN_ROWS else max(1, 16 // group)


def lean_sequences(num_sequences: int, max_query_len: int) -> int:
    """For how many the lean kernel of a batch is compiled."""
    return _power_of_two(max(MIN_LEAN_SEQUENCES if max_query_len == 1 else MIN_RARE_SEQUENCES, num_sequences))


def chunk_sequences(num_sequences: int, *, has_tree: bool) -> int:
    """For how many the chunk kernel of a batch is compiled."""
    return _power_of_two(max(MIN_RARE_SEQUENCES if has_tree else MIN_CHUNK_SEQUENCES, num_sequences))


def lean_attention(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: CudaAttentionBatch,
    out: torch.Tensor,
    *,
    window: int,
    max_query_len: int,
    tuning: Tuning | None = None,
) -> None:
    """Rows of sequences with up to max_query_len new tokens."""
    from phasewise_kernels.paged_attention.lean_triton import lean_kernel

    shape = _shape(query, k_cache)
    block_r = _power_of_two(max_query_len * shape["group"])
    is_in_bytes = has_byte_tiles(k_cache, v_cache, block_r)
    # Where rows are columns of a product it takes fewer.
    block_m = max(8 if is_in_bytes or k_cache.dtype == PACKED_DTYPE else 16, block_r)
    num_kv_heads = k_cache.shape[2]
    num_sms = batch.num_sms or _num_sms(query.device)
    has_few_outputs = len(batch.context_lens) * num_kv_heads <= num_sms
    tuning = tuning or lean_tuning(k_cache, block_m, has_few_outputs=has_few_outputs, is_in_bytes=is_in_bytes)
    num_programs = num_sms * tuning.programs_per_sm
    num_programs = max(1, num_programs // num_kv_heads) * num_kv_heads
    slots = num_programs * 2 * block_r
    lse = torch.empty(slots, dtype=torch.float32, device=query.device)
    outputs = torch.empty(slots * shape["block_d"], dtype=torch.float32, device=query.device)
    semaphores = _semaphores(query.device) if batch.semaphores is None else batch.semaphores
    assert 3 * num_programs <= len(semaphores)
    # Of one row nobody looks at a tree, and kernels differ by what they are given.
    tree_masks = batch.tree_masks if max_query_len > 1 else None
    lean_kernel[(num_programs,)](
        query,
        k_cache,
        v_cache,
        out,
        batch.block_tables,
        batch.query_starts,
        batch.context_lens,
        query if tree_masks is None else tree_masks,
        lse,
        outputs,
        semaphores,
        len(batch.context_lens),
        window,
        *_scale_and_strides(query, k_cache, v_cache, batch, out),
        **shape,
        block_m=block_m,
        block_r=block_r,
        tile_tokens=tuning.tile_tokens,
        block_sequences=lean_sequences(len(batch.context_lens), max_query_len),
        max_query_len=max_query_len,
        has_window=window > 0,
        has_tree=tree_masks is not None,
        has_byte_tiles=is_in_bytes,
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
    )


def chunk_attention(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: CudaAttentionBatch,
    out: torch.Tensor,
    *,
    window: int,
    min_query_len: int,
    tuning: Tuning | None = None,
    block_m: int = 128,
    part_tokens: int = PART_TOKENS,
) -> None:
    """Rows of sequences with at least min_query_len new tokens. part_tokens: see chunk_kernel."""
    from phasewise_kernels.paged_attention.chunk_triton import chunk_kernel

    shape = _shape(query, k_cache)
    num_kv_heads = k_cache.shape[2]
    block_m = max(block_m, _power_of_two(shape["group"]))
    tuning = tuning or chunk_tuning(query, k_cache, block_m)
    block_q = block_m // shape["group"]
    # Of n new tokens at most n / block_q tiles are full, and each sequence has one that is not.
    num_prompts = min(len(batch.context_lens), batch.num_tokens // min_query_len)
    if batch.max_prompts is not None:
        num_prompts = min(num_prompts, batch.max_prompts)
    num_tiles = batch.num_tokens // block_q + num_prompts
    num_groups = max(1, (batch.num_sms or _num_sms(query.device)) // num_kv_heads)
    # The pieces that contexts may be cut into; more tiles than these are not cut.
    slots = MAX_WAVES * num_groups * num_kv_heads
    num_places = max(num_tiles, MAX_WAVES * num_groups)
    lse = torch.empty(slots * block_m, dtype=torch.float32, device=query.device)
    outputs = torch.empty(slots * block_m * shape["block_d"], dtype=torch.float32, device=query.device)
    semaphores = _semaphores(query.device) if batch.semaphores is None else batch.semaphores
    assert slots <= len(semaphores)
    chunk_kernel[(num_kv_heads, num_places)](
        query,
        k_cache,
        v_cache,
        out,
        batch.block_tables,
        batch.query_starts,
        batch.context_lens,
        query if batch.tree_masks is None else batch.tree_masks,
        lse,
        outputs,
        semaphores,
        len(batch.context_lens),
        num_groups,
        part_tokens,
        window,
        *_scale_and_strides(query, k_cache, v_cache, batch, out),
        **shape,
        block_m=block_m,
        tile_tokens=tuning.tile_tokens,
        block_sequences=chunk_sequences(len(batch.context_lens), has_tree=batch.tree_masks is not None),
        min_query_len=min_query_len,
        max_waves=MAX_WAVES,
        merged_rows=min(block_m, max(16, MERGED_VALUES // shape["block_d"])),
        has_window=window > 0,
        has_tree=batch.tree_masks is not None,
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
    )


def split_attention(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: CudaAttentionBatch,
    out: torch.Tensor,
    *,
    window: int,
    num_splits: int,
    tuning: Tuning | None = None,
) -> None:
    """The baseline: a batch that only decodes, every output in num_splits pieces."""
    from phasewise_kernels.paged_attention.split_triton import merge_kernel, split_kernel

    shape = _shape(query, k_cache)
    block_m = max(16, _power_of_two(shape["group"]))
    tuning = tuning or lean_tuning(k_cache, block_m)
    num_outputs = len(batch.context_lens) * k_cache.shape[2]
    slots = num_outputs * num_splits * block_m
    stats = torch.empty(slots * 2, dtype=torch.float32, device=query.device)
    outputs = torch.empty(slots * shape["block_d"], dtype=torch.float32, device=query.device)
    scale, q_token, q_head, out_token, out_head, *strides = _scale_and_strides(
        query, k_cache, v_cache, batch, out
    )
    split_kernel[(num_splits, num_outputs)](
        query,
        k_cache,
        v_cache,
        batch.block_tables,
        batch.context_lens,
        stats,
        outputs,
        window,
        scale,
        q_token,
        q_head,
        *strides,
        **shape,
        block_m=block_m,
        tile_tokens=tuning.tile_tokens,
        has_window=window > 0,
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
    )
    del shape["block_size"]
    merge_kernel[(num_outputs,)](
        stats,
        outputs,
        out,
        batch.context_lens,
        out_token,
        out_head,
        num_splits,
        **shape,
        block_m=block_m,
        num_warps=4,
    )


def lean_tuning(
    k_cache: torch.Tensor, block_m: int, *, has_few_outputs: bool = False, is_in_bytes: bool = False
) -> Tuning:
    """Measured on an H100, see docs/gpu-kernels.md.

    has_few_outputs: no more of them, one for each KV head of a sequence, than SMs. is_in_bytes: see has_byte_tiles.
    """
    if is_in_bytes or (k_cache.dtype == PACKED_DTYPE and block_m <= 16):
        # A program of one warp has all of a tile in its registers, and waits for no other.
        many, few = Tuning(32, num_warps=1, num_stages=2, programs_per_sm=8), Tuning(32, 1, 3, 4)
        if is_in_bytes:
            few = Tuning(64, num_warps=4, num_stages=3, programs_per_sm=2)
        return few if has_few_outputs else many
    row_bytes = _power_of_two(k_cache.shape[3]) * k_cache.element_size()
    if row_bytes > 256 or block_m > 16:
        tile_tokens = 64 if row_bytes <= 256 else 32 if row_bytes <= 512 else 16
        return Tuning(tile_tokens, num_warps=4, num_stages=3, programs_per_sm=2 if block_m == 16 else 1)
    if row_bytes == 128 and k_cache.element_size() == 1:
        # Many small programs: while one converts, others read.
        return Tuning(tile_tokens=32, num_warps=2, num_stages=4, programs_per_sm=4)
    if row_bytes <= 128:
        return Tuning(tile_tokens=128, num_warps=4, num_stages=3, programs_per_sm=2)
    # Few outputs are sooner merged of fewer parts, many are read faster by more programs.
    return Tuning(tile_tokens=64, num_warps=4, num_stages=3, programs_per_sm=1 if has_few_outputs else 2)


def chunk_tuning(query: torch.Tensor, k_cache: torch.Tensor, block_m: int) -> Tuning:
    """Measured on an H100, see docs/gpu-kernels.md; with fewer stages where a multiprocessor has less shared memory."""
    row_bytes = _power_of_two(query.shape[2]) * query.element_size()
    room = _shared_bytes(query.device) - block_m * row_bytes - SHARED_REST_BYTES
    tile_tokens, num_stages = (64, 4) if row_bytes <= 256 else (32 if row_bytes <= 512 else 16, 2)
    # What is converted waits for that: fewer and larger tiles.
    if k_cache.element_size() == 1 and row_bytes == 256 and room >= 2 * 2 * 128 * row_bytes:
        tile_tokens, num_stages = 128, 2
    stage_bytes = 2 * tile_tokens * row_bytes
    return Tuning(tile_tokens, num_warps=8, num_stages=max(1, min(num_stages, room // stage_bytes)))


def has_byte_tiles(k_cache: torch.Tensor, v_cache: torch.Tensor, num_rows: int) -> bool:
    """Whether the lean kernel reads them by `byte_tiles_triton.py`, which is for words that lie where words do."""
    begins = k_cache.data_ptr(), v_cache.data_ptr()
    return (
        k_cache.dtype == torch.float8_e4m3fn
        and k_cache.shape[3] == BYTE_TILES_HEAD_DIM
        and num_rows <= 16
        and not any(one % 16 for one in (*begins, *k_cache.stride()[:3], *v_cache.stride()[:3]))
    )


def _check(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: CudaAttentionBatch
) -> None:
    num_tokens, num_heads, head_dim = query.shape
    if num_tokens != batch.num_tokens:
        raise ValueError(f"query has {num_tokens} tokens, the batch {batch.num_tokens}")
    is_same = k_cache.shape == v_cache.shape and k_cache.shape[1] == batch.block_size
    if not is_same or head_dim_of(k_cache) != head_dim:
        raise ValueError(
            f"caches of {tuple(k_cache.shape)} and {tuple(v_cache.shape)} "
            f"for blocks of {batch.block_size} tokens and heads of {head_dim}"
        )
    if num_heads % k_cache.shape[2]:
        raise ValueError(f"{num_heads} query heads cannot share {k_cache.shape[2]} KV heads")
    if k_cache.dtype != v_cache.dtype or k_cache.dtype not in (
        query.dtype,
        torch.float8_e4m3fn,
        PACKED_DTYPE,
    ):
        raise ValueError(f"a query in {query.dtype} over caches in {k_cache.dtype} and {v_cache.dtype}")
    if {tensor.stride(-1) for tensor in (query, k_cache, v_cache)} != {1}:
        raise ValueError("values of a head do not follow each other in memory")
    if k_cache.dtype == PACKED_DTYPE and any(
        one % 8 for one in (*k_cache.stride()[:3], *v_cache.stride()[:3])
    ):
        raise ValueError("rows in four bits do not begin at multiples of 8 bytes")


def _shape(query: torch.Tensor, k_cache: torch.Tensor) -> dict[str, Any]:
    """What all kernels are compiled for."""
    _, block_size, num_kv_heads, _ = k_cache.shape
    head_dim = query.shape[2]
    return {
        "num_kv_heads": num_kv_heads,
        "group": query.shape[1] // num_kv_heads,
        "head_dim": head_dim,
        "block_size": block_size,
        "block_d": max(16, _power_of_two(head_dim)),
    }


def _scale_and_strides(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: CudaAttentionBatch,
    out: torch.Tensor,
) -> tuple[float | int, ...]:
    """In the order of the kernels' arguments."""
    return (
        query.shape[2] ** -0.5 * _LOG2_E,
        *query.stride()[:2],
        *out.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        batch.block_tables.stride(0),
    )


def _power_of_two(number: int) -> int:
    """The smallest that is not below."""
    return 1 << (number - 1).bit_length()


@cache
def _shared_bytes(device: torch.device) -> int:
    """That a program may have; of an H100 where there is no GPU."""
    if device.type != "cuda":
        return 232_448
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


@cache
def _num_sms(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


_own_semaphores: dict[torch.device, torch.Tensor] = {}


def _semaphores(device: torch.device) -> torch.Tensor:
    if device not in _own_semaphores:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # Zeros that are written when the graph is replayed are no zeros now.
            raise RuntimeError("the first call on a device must not be captured in a CUDA graph")
        _own_semaphores[device] = torch.zeros(NUM_SEMAPHORES, dtype=torch.int32, device=device)
    return _own_semaphores[device]

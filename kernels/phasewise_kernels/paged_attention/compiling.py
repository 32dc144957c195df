"""Attention kernels of all steps that an engine may have, compiled ahead and side by side.

Each takes seconds, and which one a step needs depends on its number of sequences, on its new tokens, and on whether there is a tree
among them: one that is compiled when it is first needed makes all sequences wait.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product

import torch

from phasewise_kernels.kv_int4.op import head_dim_of
from phasewise_kernels.paged_attention.cuda import (
    MAX_LEAN_ROWS,
    MIN_CHUNK_SEQUENCES,
    MIN_LEAN_SEQUENCES,
    MIN_RARE_SEQUENCES,
    CudaAttentionBatch,
    chunk_sequences,
    lean_query_len,
    lean_sequences,
    paged_attention_cuda,
)

#: Beyond so many threads compiling becomes no faster.
MAX_THREADS = 16


@dataclass(frozen=True, slots=True)
class StepShape:
    """Of a batch, as far as kernels differ by it. query_len: most new tokens of a sequence."""

    num_sequences: int
    query_len: int
    has_tree: bool = False

    def kernels(self, group: int) -> frozenset[tuple[object, ...]]:
        """What tells those apart that a batch of this shape needs. group: query heads of a KV head."""
        lean_len = lean_query_len(self.query_len, group)
        has_tree = self.has_tree and lean_len > 1
        found: set[tuple[object, ...]] = {
            ("lean", lean_sequences(self.num_sequences, lean_len), lean_len, has_tree)
        }
        if self.query_len > lean_len:
            num_sequences = chunk_sequences(self.num_sequences, has_tree=self.has_tree)
            found.add(("chunk", num_sequences, lean_len + 1, self.has_tree))
        return frozenset(found)


def step_shapes(max_sequences: int, group: int) -> list[StepShape]:
    """So few that no step of up to max_sequences needs another kernel than these do."""
    counts = {max_sequences}
    count = min(MIN_LEAN_SEQUENCES, MIN_CHUNK_SEQUENCES, MIN_RARE_SEQUENCES)
    while count < max_sequences:
        counts.add(count)
        count *= 2
    # Decodes, drafts of all lengths that the lean kernel reads for, and prompts.
    lens = range(1, MAX_LEAN_ROWS // group + 2)
    shapes, known = [], set[tuple[object, ...]]()
    for num_sequences, query_len, has_tree in product(sorted(counts), lens, (False, True)):
        shape = StepShape(num_sequences, query_len, has_tree)
        if not shape.kernels(group) <= known:
            known |= shape.kernels(group)
            shapes.append(shape)
    return shapes


def compile_attention(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    num_heads: int,
    dtype: torch.dtype,
    windows: Iterable[int],
    max_sequences: int,
    progress: Callable[[float], None],
) -> None:
    """By computing batches of no context, which read and write nothing.

    k_cache, v_cache, dtype (of the query), windows (of the layers): as `paged_attention_cuda` will be called. progress: is
    told of the part that is done; may raise to stop.
    """
    group = num_heads // k_cache.shape[2]
    # Kernels differ by whether there is a window.
    kinds = {window > 0: window for window in windows}
    jobs = list(product(step_shapes(max_sequences, group), kinds.values()))

    def compute(shape: StepShape, window: int) -> None:
        with torch.cuda.device(k_cache.device):
            batch = _batch_of_nothing(shape, k_cache)
            query = torch.zeros(
                batch.num_tokens, num_heads, head_dim_of(k_cache), dtype=dtype, device=k_cache.device
            )
            paged_attention_cuda(query, k_cache, v_cache, batch, window=window)

    # The first alone: it makes what all share.
    compute(*jobs[0])
    threads = ThreadPoolExecutor(min(MAX_THREADS, len(os.sched_getaffinity(0))))
    running = [threads.submit(compute, *job) for job in jobs[1:]]
    try:
        for num_done, one in enumerate(as_completed(running), 2):
            one.result()
            progress(num_done / len(jobs))
    finally:
        # Whoever stops it, by progress, waits for none that has not begun.
        threads.shutdown(cancel_futures=True)


def _batch_of_nothing(shape: StepShape, k_cache: torch.Tensor) -> CudaAttentionBatch:
    num_tokens, device = shape.num_sequences + shape.query_len, k_cache.device

    def zeros(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    return CudaAttentionBatch(
        zeros(shape.num_sequences, 1),
        zeros(shape.num_sequences + 1),
        zeros(shape.num_sequences),
        block_size=k_cache.shape[1],
        num_tokens=num_tokens,
        max_query_len=shape.query_len,
        max_context_len=1,
        tree_masks=zeros(num_tokens, dtype=torch.int64) if shape.has_tree else None,
    )

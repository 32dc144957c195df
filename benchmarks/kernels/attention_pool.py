"""Batches of attention over a pool that no cache holds, and how long a call over them takes."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.kernels.attention_shapes import BLOCK_SIZE, HEAD_DIM, NUM_HEADS
from phasewise_kernels.kv_int4.op import PACKED_DTYPE
from phasewise_kernels.kv_int4.rows import row_bytes
from phasewise_kernels.paged_attention.cuda import CudaAttentionBatch

#: Of K, and of V.
POOL_BYTES = 18 << 30
#: Calls of a graph together read at least this, several times what the L2 cache holds.
COLD_BYTES = 1 << 29
Caches = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Part:
    """A batch in one part of the pool."""

    query: torch.Tensor
    caches: Caches
    #: The same tokens without a block table, [num_tokens, num_kv_heads, head_dim].
    flat: Caches
    batch: CudaAttentionBatch
    out: torch.Tensor

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Of the kernels."""
        return self.query, *self.caches, self.batch, self.out


class Pool:
    """K and V of many tokens, to be seen as caches of any number of KV heads."""

    def __init__(self) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        self.planes = [
            torch.empty(POOL_BYTES // 2, dtype=torch.bfloat16, device="cuda").normal_(generator=generator)
            for _ in "kv"
        ]

    def parts(
        self,
        lengths: Sequence[tuple[int, int]],
        num_kv_heads: int,
        dtype: torch.dtype = torch.bfloat16,
        block_size: int = BLOCK_SIZE,
    ) -> list[Part]:
        """As many as are needed to read from memory; lengths: (new tokens, all tokens)."""
        blocks = [-(-context_len // block_size) for _, context_len in lengths]
        # In four bits K and V are random bytes, among them scales that are no numbers: nothing takes longer for that.
        width = row_bytes(HEAD_DIM) if dtype == PACKED_DTYPE else HEAD_DIM
        num_blocks, block_values = sum(blocks), block_size * num_kv_heads * width
        planes = [
            plane.view(torch.uint8).view(dtype) if dtype.itemsize == 1 else plane for plane in self.planes
        ]
        fits = len(planes[0]) // (num_blocks * block_values)
        count = min(fits, 1 + COLD_BYTES // (2 * num_blocks * block_values * dtype.itemsize), 32)
        assert count, "too large for the pool"
        tables = torch.zeros(len(lengths), max(blocks), dtype=torch.int32, device="cuda")
        order = torch.randperm(num_blocks, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
        for row, piece in zip(tables, order.to(torch.int32).split(blocks), strict=True):
            row[: len(piece)] = piece
        query_lens, context_lens = zip(*lengths, strict=True)
        batch = CudaAttentionBatch(
            tables,
            starts_of(query_lens),
            torch.tensor(context_lens, dtype=torch.int32, device="cuda"),
            block_size,
            sum(query_lens),
            max(query_lens),
            max(context_lens),
        )
        shape = (num_blocks, block_size, num_kv_heads, width)
        parts = []
        for i in range(count):
            values = slice(i * num_blocks * block_values, (i + 1) * num_blocks * block_values)
            caches = planes[0][values].view(shape), planes[1][values].view(shape)
            flat = caches[0].flatten(0, 1)[: sum(context_lens)], caches[1].flatten(0, 1)[: sum(context_lens)]
            query = torch.randn(sum(query_lens), NUM_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
            parts.append(Part(query, caches, flat, batch, torch.empty_like(query)))
        return parts


def starts_of(lengths: Sequence[int]) -> torch.Tensor:
    """[len + 1] int32."""
    return torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)


def time_s(call: Callable[[Any], object], inputs: Sequence[Any], num_replays: int = 5) -> float:
    """Of one call, on the GPU; the inputs take turns."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for one in inputs[:2]:
            call(one)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in inputs:
            call(one)
    graph.replay()
    times = []
    for _ in range(num_replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000 / len(inputs))
    return statistics.median(times)


def copy_bytes_per_s() -> float:
    """Read and written, by an elementwise kernel: in a graph torch's own copy is slower."""
    source = torch.randn(1 << 29, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_s(lambda _: torch.mul(source, 1, out=target), range(8))

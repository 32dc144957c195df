"""Steps on a GPU: what the forward pass reads is staged by one copy, and decode steps replay CUDA graphs.

On a CPU the same code runs with padding and without graphs, for tests.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from phasewise_kernels.paged_attention.cuda import CudaAttentionBatch
from phasewise_kernels.paged_attention.padded import tree_mask_bits
from workers.device.buckets import bucket_of
from workers.device.staging import Staging, layout, views
from workers.model.forward_batch import Embeds, ForwardBatch, ForwardInputs, Mixes, RowBatch, logit_row_batch
from workers.model.llama import Llama

logger = logging.getLogger(__name__)

#: Of a row of padding: nothing is written.
NO_SLOT = -1
#: Of a token that the host knows; see DeviceForward.
FROM_HOST = -1
#: Eager steps before a capture: libraries choose kernels and take workspaces in them.
NUM_WARM_UPS = 2
#: Numbers of sequences between which kernels differ, and tokens that are no decode's.
WARM_UP_SIZES = (1, 16, 32, 64, 128, 256, 512, 1024)
WARM_UP_CHUNK = 64

Array = NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class _Graph:
    """A captured decode step of so many rows, and the memory that it reads and writes."""

    size: int
    graph: torch.cuda.CUDAGraph | None
    inputs: ForwardInputs
    #: Where the arrays of a step are copied to; block tables are spread from it into `block_tables`.
    buffer: torch.Tensor
    block_tables: torch.Tensor
    #: [size, vocab_size].
    logits: torch.Tensor


class DeviceForward:
    """Runs the forward pass of a model on its device.

    max_context_tokens: of one sequence. buckets: sizes of decode steps to capture, ascending; none captures nothing.
    Calls come from one thread and are on its current stream; what is returned is there too, and valid until the next call.
    """

    def __init__(
        self,
        model: Llama,
        kv_cache: torch.Tensor,
        *,
        max_context_tokens: int,
        buckets: Sequence[int] = (),
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._device = model.device
        self._block_size = kv_cache.shape[3]
        self._num_slots = kv_cache.shape[2] * kv_cache.shape[3]
        self._max_context_tokens = max_context_tokens
        self._buckets = tuple(buckets)
        self._staging = Staging(self._device)
        self._graphs: dict[int, _Graph] = {}
        #: Steps that replayed a graph, and others.
        self.num_replayed = 0
        self.num_eager = 0

    @torch.inference_mode()
    def __call__(
        self,
        batch: ForwardBatch,
        *,
        layer_group_size: int | None = None,
        on_layers: Callable[[int, int], None] | None = None,
        sources: NDArray[np.int64] | None = None,
        previous: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the tokens of `batch`, write their K and V, and return logits, [len(logit_rows), vocab_size].

        on_layers: see `Llama.forward`; on a GPU it is told of layers as soon as their work is launched.
        sources: [num_tokens]; which of `previous`, on the device, is the token of each row, or FROM_HOST.
        """
        if int(batch.slots.max()) >= self._num_slots or int(batch.slots.min()) < 0:
            raise ValueError(f"slots {batch.slots.tolist()} are not all in the KV cache")
        size = self._graph_size(batch)
        if size is not None:
            self.num_replayed += 1
            logits = self._replay(self._graphs[size], batch, sources, previous)
            if on_layers is not None:
                on_layers(0, len(self._kv_cache))
            return logits
        self.num_eager += 1
        inputs = self._inputs(batch, sources, previous)
        return self._model.compute(
            inputs, self._kv_cache, layer_group_size=layer_group_size, on_layers=on_layers
        )

    # Eager steps.

    def _inputs(
        self, batch: ForwardBatch, sources: NDArray[np.int64] | None, previous: torch.Tensor | None
    ) -> ForwardInputs:
        rows = logit_row_batch(batch)
        arrays: list[Array] = [
            batch.token_ids.numpy(),
            batch.positions.numpy(),
            batch.slots.numpy(),
            batch.logit_rows.numpy(),
            *_attention_arrays(batch.block_tables, batch.query_lens, batch.context_lens),
        ]
        optional: list[Array | None] = [
            batch.rope_lens.numpy() if batch.rope_lens is not None else None,
            batch.rope_positions.numpy() if batch.rope_positions is not None else None,
            sources,
            _tree_bits(batch) if batch.tree_masks else None,
        ]
        if rows is not None:
            arrays += _attention_arrays(
                rows.block_tables, np.ones(len(rows.context_lens), np.int64), rows.context_lens
            )
        arrays += [array for array in optional if array is not None]
        found = iter(self._staging.upload(arrays))
        token_ids, positions, slots, logit_rows = (next(found) for _ in range(4))
        tables = [next(found) for _ in range(3)]
        row_tables = [next(found) for _ in range(3)] if rows is not None else None
        rope_lens, rope_positions, device_sources, tree_masks = (
            next(found) if array is not None else None for array in optional
        )
        if device_sources is not None and previous is not None:
            token_ids = _with_previous(token_ids, device_sources, previous)
        if sources is not None and self._model.ranks is not None:
            self._model.ranks.share(token_ids)
        return ForwardInputs(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            rope_lens=rope_lens,
            rope_positions=rope_positions,
            mixes=self._mixes(batch.mixes),
            embeds=self._embeds(batch.embeds),
            attention=self._attention(batch, tables, tree_masks),
            logit_rows=None if _are_all_logit_rows(batch) else logit_rows,
            logit_attention=self._row_attention(rows, row_tables),
        )

    def _attention(
        self, batch: ForwardBatch, tables: list[torch.Tensor], tree_masks: torch.Tensor | None
    ) -> CudaAttentionBatch:
        block_tables, query_starts, context_lens = tables
        return CudaAttentionBatch(
            block_tables,
            query_starts,
            context_lens,
            self._block_size,
            len(batch.token_ids),
            int(batch.query_lens.max()),
            int(batch.context_lens.max()),
            int(batch.query_lens.min()),
            tree_masks=tree_masks,
        )

    def _row_attention(
        self, rows: RowBatch | None, tables: list[torch.Tensor] | None
    ) -> CudaAttentionBatch | None:
        if rows is None or tables is None:
            return None
        block_tables, query_starts, context_lens = tables
        num_rows, longest = len(rows.context_lens), int(rows.context_lens.max())
        return CudaAttentionBatch(
            block_tables, query_starts, context_lens, self._block_size, num_rows, 1, longest
        )

    def _mixes(self, mixes: Mixes | None) -> Mixes | None:
        if mixes is None:
            return None
        return Mixes(*(one.to(self._device) for one in (mixes.rows, mixes.token_ids, mixes.weights)))

    def _embeds(self, embeds: Embeds | None) -> Embeds | None:
        if embeds is None:
            return None
        return Embeds(embeds.rows.to(self._device), embeds.values.to(self._device, self._model.dtype))

    # Decode steps.

    def _graph_size(self, batch: ForwardBatch) -> int | None:
        """Rows of the graph that computes this step; None when none can."""
        num_rows = len(batch.token_ids)
        is_plain = (
            len(batch.query_lens) == num_rows
            and _are_all_logit_rows(batch)
            and batch.mixes is None
            and batch.embeds is None
            and batch.rope_positions is None
        )
        size = bucket_of(num_rows, self._buckets) if is_plain else None
        return size if size in self._graphs else None

    @torch.inference_mode()
    def warm_up(self, max_sequences: int, progress: Callable[[str, float], None]) -> None:
        """Steps of a chunk and up to so many decodes, in a block that no sequence owns yet: kernels are compiled by number of
        sequences, and libraries choose theirs."""
        sizes = [size for size in WARM_UP_SIZES if size < max_sequences] + [max_sequences]
        num_chunk = min(WARM_UP_CHUNK, self._num_slots)
        for i, size in enumerate(sizes):
            progress(f"preparing the GPU kernels ({size} sequences)", i / len(sizes))
            lens = np.array([1] * (size - 1) + [num_chunk])
            num_blocks = -(-num_chunk // self._block_size)
            batch = ForwardBatch(
                token_ids=torch.zeros(int(lens.sum()), dtype=torch.int64),
                positions=torch.zeros(int(lens.sum()), dtype=torch.int64),
                # All write to the same few slots: nobody reads what comes out.
                slots=torch.zeros(int(lens.sum()), dtype=torch.int64),
                block_tables=np.tile(np.arange(num_blocks, dtype=np.int32), (size, 1)),
                query_lens=lens,
                context_lens=lens,
                logit_rows=torch.from_numpy(np.cumsum(lens) - 1),
            )
            self._model.compute(self._inputs(batch, None, None), self._kv_cache)

    @torch.inference_mode()
    def capture(self, progress: Callable[[str, float], None]) -> None:
        """Capture all sizes, the largest first: the others then fit into the memory that it took."""
        pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None
        for i, size in enumerate(reversed(self._buckets)):
            progress(f"capturing decode steps ({size} sequences)", i / len(self._buckets))
            self._graphs[size] = self._captured(size, pool)

    def _captured(self, size: int, pool: Any) -> _Graph:
        max_blocks = -(-self._max_context_tokens // self._block_size)
        arrays = _decode_arrays(size, max_blocks)
        arrays[2][:] = NO_SLOT
        _, num_bytes = layout(arrays)
        buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)
        static = self._staging.upload(arrays, buffer)
        block_tables = torch.zeros(size, max_blocks, dtype=torch.int32, device=self._device)
        query_starts = torch.arange(size + 1, dtype=torch.int32, device=self._device)
        inputs = ForwardInputs(
            token_ids=static[0],
            positions=static[1],
            slots=static[2],
            rope_lens=static[3],
            rope_positions=None,
            mixes=None,
            embeds=None,
            attention=CudaAttentionBatch(
                block_tables,
                query_starts,
                static[5],
                self._block_size,
                size,
                1,
                self._max_context_tokens,
            ),
            logit_rows=None,
            logit_attention=None,
        )
        if self._device.type != "cuda":
            return _Graph(size, None, inputs, buffer, block_tables, self._compute(inputs))
        for _ in range(NUM_WARM_UPS):
            self._compute(inputs)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # Threads of NCCL may ask their events meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            logits = self._compute(inputs)
        return _Graph(size, graph, inputs, buffer, block_tables, logits)

    def _compute(self, inputs: ForwardInputs) -> torch.Tensor:
        return self._model.compute(inputs, self._kv_cache)

    def _replay(
        self,
        graph: _Graph,
        batch: ForwardBatch,
        sources: NDArray[np.int64] | None,
        previous: torch.Tensor | None,
    ) -> torch.Tensor:
        num_rows, num_blocks = batch.block_tables.shape
        arrays = _decode_arrays(graph.size, num_blocks)
        token_ids, positions, slots, rope_lens, device_sources, context_lens, tables = arrays
        slots[num_rows:] = NO_SLOT
        device_sources[:] = FROM_HOST
        token_ids[:num_rows] = batch.token_ids.numpy()
        positions[:num_rows] = batch.positions.numpy()
        slots[:num_rows] = batch.slots.numpy()
        rope_lens[:num_rows] = (
            batch.rope_lens.numpy() if batch.rope_lens is not None else positions[:num_rows] + 1
        )
        context_lens[:num_rows] = batch.context_lens
        tables[:num_rows] = batch.block_tables
        if sources is not None:
            device_sources[:num_rows] = sources
        self._staging.upload(arrays, graph.buffer)
        found = views(graph.buffer, arrays)
        graph.block_tables[:, :num_blocks].copy_(found[6])
        if sources is not None and previous is not None:
            found[0].copy_(_with_previous(found[0], found[4], previous))
        if sources is not None and self._model.ranks is not None:
            self._model.ranks.share(found[0])
        if graph.graph is None:
            return self._compute(graph.inputs)[:num_rows]
        graph.graph.replay()
        return graph.logits[:num_rows]


def _are_all_logit_rows(batch: ForwardBatch) -> bool:
    """Every row needs logits, and in this order."""
    return np.array_equal(batch.logit_rows.numpy(), np.arange(len(batch.token_ids)))


def _decode_arrays(size: int, num_blocks: int) -> list[NDArray[np.int64 | np.int32]]:
    """Tokens, positions, slots, rope_lens, sources, contexts and block tables of a decode step, all 0."""
    return [
        *(np.zeros(size, np.int64) for _ in range(5)),
        np.zeros(size, np.int32),
        np.zeros((size, num_blocks), np.int32),
    ]


def _attention_arrays(
    block_tables: NDArray[np.int32], query_lens: NDArray[np.int64], context_lens: NDArray[np.int64]
) -> list[Array]:
    """Block tables, query_starts and contexts, int32."""
    starts = np.zeros(len(query_lens) + 1, np.int32)
    np.cumsum(query_lens, out=starts[1:])
    return [block_tables, starts, context_lens.astype(np.int32)]


def _tree_bits(batch: ForwardBatch) -> Array:
    """See CudaAttentionBatch."""
    bits = np.zeros(len(batch.token_ids), np.int64)
    first_rows = np.cumsum(batch.query_lens) - batch.query_lens
    for i, mask in batch.tree_masks.items():
        bits[first_rows[i] : first_rows[i] + len(mask)] = tree_mask_bits(torch.from_numpy(mask)).numpy()
    return bits


def _with_previous(token_ids: torch.Tensor, sources: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """Tokens that were sampled on the device and that the host has not seen, in the place of those that it did not know."""
    return torch.where(sources >= 0, previous[sources.clamp(min=0)].clamp(min=0), token_ids)

"""Steps on a GPU: what the forward pass reads is staged by one copy, and steps replay CUDA graphs where they can.

On a CPU the same code runs with padding and without graphs, for tests.
"""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from phasewise_kernels.paged_attention.compiling import compile_attention
from phasewise_kernels.paged_attention.cuda import CudaAttentionBatch
from phasewise_kernels.paged_attention.padded import tree_mask_bits
from workers.device.buckets import bucket_of
from workers.device.staging import Staging
from workers.device.step_graph import MAX_PROMPTS, Side, StepGraph, axes_of, buffer_bytes, with_previous
from workers.model.forward_batch import Embeds, ForwardBatch, ForwardInputs, Mixes, RowBatch, logit_row_batch
from workers.model.llama import Llama

logger = logging.getLogger(__name__)

#: Numbers of sequences between which libraries choose other kernels, and tokens that are no decode's.
WARM_UP_SIZES = (1, 16, 32, 64, 128, 256, 512, 1024)
WARM_UP_CHUNK = 64

Array = NDArray[np.generic]


class DeviceForward:
    """Runs the forward pass of a model on its device.

    max_context_tokens: of one sequence. buckets: sizes of decode steps to capture, ascending; none captures nothing.
    mixed_buckets: tokens of steps with prompts to capture, ascending, of as many sequences as the largest decode step has.
    Calls come from one thread and are on its current stream; what is returned is there too, and valid until the next call.
    side: of steps that run beside those of another one, captured on the stream that is current then; None has the device for itself.
    """

    def __init__(
        self,
        model: Llama,
        kv_cache: torch.Tensor,
        *,
        max_context_tokens: int,
        buckets: Sequence[int] = (),
        mixed_buckets: Sequence[int] = (),
        side: Side | None = None,
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._device = model.device
        self._block_size = kv_cache.shape[3]
        self._num_slots = kv_cache.shape[2] * kv_cache.shape[3]
        self._max_context_tokens = max_context_tokens
        self._buckets = tuple(buckets)
        self._mixed_buckets = tuple(mixed_buckets) if buckets else ()
        self._side = side
        self._staging = Staging(self._device)
        #: By the size of the step, and its tokens.
        self._decode_graphs: dict[int, StepGraph] = {}
        self._mixed_graphs: dict[int, StepGraph] = {}
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
        graph = self._graph_for(batch, layer_group_size)
        if graph is not None:
            self.num_replayed += 1
            logits = graph.replay(batch, sources, previous)
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
            batch.embeds.rows.numpy() if batch.embeds is not None else None,
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
        rope_lens, rope_positions, device_sources, tree_masks, embed_rows = (
            next(found) if array is not None else None for array in optional
        )
        if device_sources is not None and previous is not None:
            token_ids = with_previous(token_ids, device_sources, previous)
        if sources is not None and self._model.ranks is not None:
            self._model.ranks.share(token_ids)
        return ForwardInputs(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            rope_lens=rope_lens,
            rope_positions=rope_positions,
            mixes=self._mixes(batch.mixes),
            embeds=Embeds(embed_rows, batch.embeds.values)
            if embed_rows is not None and batch.embeds is not None
            else None,
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
            semaphores=self._side.semaphores if self._side is not None else None,
            num_sms=self._side.num_sms if self._side is not None else None,
        )

    def _row_attention(
        self, rows: RowBatch | None, tables: list[torch.Tensor] | None
    ) -> CudaAttentionBatch | None:
        if rows is None or tables is None:
            return None
        block_tables, query_starts, context_lens = tables
        num_rows, longest = len(rows.context_lens), int(rows.context_lens.max())
        return CudaAttentionBatch(
            block_tables,
            query_starts,
            context_lens,
            self._block_size,
            num_rows,
            1,
            longest,
            semaphores=self._side.semaphores if self._side is not None else None,
            num_sms=self._side.num_sms if self._side is not None else None,
        )

    def _mixes(self, mixes: Mixes | None) -> Mixes | None:
        if mixes is None:
            return None
        return Mixes(*(one.to(self._device) for one in (mixes.rows, mixes.token_ids, mixes.weights)))

    # Captured steps.

    def _graph_for(self, batch: ForwardBatch, layer_group_size: int | None) -> StepGraph | None:
        """That which computes this step; None when none can."""
        if batch.mixes is not None:
            return None
        num_tokens, num_sequences = len(batch.token_ids), len(batch.query_lens)
        if num_sequences == num_tokens and batch.embeds is None and _are_all_logit_rows(batch):
            size = bucket_of(num_tokens, self._buckets)
            return self._decode_graphs.get(size) if size is not None else None
        is_mixed = (
            # What is sent as it is computed is told of by layers.
            (layer_group_size is None or layer_group_size >= len(self._kv_cache))
            and not batch.tree_masks
            and len(batch.logit_rows) <= num_sequences
            and int((batch.query_lens > 1).sum()) <= MAX_PROMPTS
        )
        size = bucket_of(num_tokens, self._mixed_buckets) if is_mixed else None
        graph = self._mixed_graphs.get(size) if size is not None else None
        return graph if graph is not None and num_sequences <= graph.num_sequences else None

    @torch.inference_mode()
    def warm_up(self, max_sequences: int, progress: Callable[[str, float], None]) -> None:
        """Compile the kernels of steps of up to so many sequences; libraries choose theirs by steps of a chunk and of decodes, in a
        block that no sequence owns yet."""
        if self._device.type == "cuda":
            config = self._model.config
            compile_attention(
                *self._kv_cache[0],
                num_heads=config.num_heads,
                dtype=self._model.dtype,
                windows=[config.window(i) for i in range(config.num_layers)],
                max_sequences=max_sequences,
                progress=lambda done: progress("compiling the attention kernels", done),
            )
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

    def _embedding_buffer(self) -> torch.Tensor | None:
        """Of the pictures of one captured step; None where the model takes none, no step with prompts is captured, or one runs beside others."""
        config = self._model.config
        if config.vision is None or not self._mixed_buckets or self._side is not None:
            return None
        shape = self._mixed_buckets[-1], config.hidden_size
        return torch.zeros(shape, dtype=self._model.dtype, device=self._device)

    @torch.inference_mode()
    def capture(self, progress: Callable[[str, float], None]) -> None:
        """Capture all sizes, the largest first: the others then fit into the memory that it took."""
        if not self._buckets:
            return
        pool = stream = None
        if self._device.type == "cuda":
            pool = torch.cuda.graph_pool_handle()
            stream = torch.cuda.current_stream() if self._side is not None else torch.cuda.Stream()  # type: ignore[no-untyped-call]
        most = self._buckets[-1]
        max_blocks = -(-self._max_context_tokens // self._block_size)
        tables = torch.zeros(most, max_blocks, dtype=torch.int32, device=self._device)
        logits = torch.zeros(
            most, self._model.config.vocab_size, dtype=self._model.dtype, device=self._device
        )
        num_tokens = max(most, *self._mixed_buckets) if self._mixed_buckets else most
        buffer = torch.zeros(
            buffer_bytes(num_tokens, most, max_blocks, axes_of(self._model)),
            dtype=torch.uint8,
            device=self._device,
        )
        shared = self._model, self._kv_cache, self._staging, tables, logits, buffer
        embeddings = self._embedding_buffer()
        num_graphs = len(self._mixed_buckets) + len(self._buckets)
        with no_collection():
            for i, size in enumerate(reversed(self._mixed_buckets)):
                progress(f"capturing steps with prompts ({size} tokens)", i / num_graphs)
                self._mixed_graphs[size] = StepGraph(
                    *(*shared, embeddings),
                    num_tokens=size,
                    num_sequences=min(size, most),
                    is_mixed=True,
                    pool=pool,
                    stream=stream,
                    side=self._side,
                )
            for i, size in enumerate(reversed(self._buckets), len(self._mixed_buckets)):
                progress(f"capturing decode steps ({size} sequences)", i / num_graphs)
                self._decode_graphs[size] = StepGraph(
                    *(*shared, None),
                    num_tokens=size,
                    num_sequences=size,
                    is_mixed=False,
                    pool=pool,
                    stream=stream,
                    side=self._side,
                )

    def drop_graphs(self) -> None:
        """Steps are computed eagerly from now on."""
        self._decode_graphs.clear()
        self._mixed_graphs.clear()


@contextmanager
def no_collection() -> Iterator[None]:
    """Garbage is collected before, and not while steps are captured: a graph among it that is destroyed would end the capture."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _are_all_logit_rows(batch: ForwardBatch) -> bool:
    """Every row needs logits, and in this order."""
    return np.array_equal(batch.logit_rows.numpy(), np.arange(len(batch.token_ids)))


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

"""One captured step: the memory that it reads, how a batch is put there, and its replay.

On a CPU it is computed in place of the replay, padding and all, for tests.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from phasewise_kernels.paged_attention.cuda import CudaAttentionBatch
from workers.device.staging import Staging, layout
from workers.model.forward_batch import Embeds, ForwardBatch, ForwardInputs, PlacedEmbeds
from workers.model.llama import Llama
from workers.model.mrope import NUM_AXES

#: Of a row of padding: nothing is written.
NO_SLOT = -1
#: Of a token that the host knows; see DeviceForward.
FROM_HOST = -1
#: Of a row whose embedding is that of its token.
NO_EMBEDDING = -1
#: Eager steps before a capture: libraries choose kernels and take workspaces in them.
NUM_WARM_UPS = 2
#: Sequences of a mixed step that have more new tokens than a decode's kernel takes: the launch has a tile for each.
MAX_PROMPTS = 32
#: By more, attention of prompts is cut otherwise; most contexts are shorter.
TYPICAL_CONTEXT = 4096


@dataclass(frozen=True, slots=True)
class Side:
    """What steps that run beside others need of their own.

    num_sms: that their stream has. semaphores: see CudaAttentionBatch; of all steps of one phase, which follow each other.
    layers_per_piece: a step with prompts is a graph for each so many layers. One of all would keep a graph on another stream from
    starting until it has ended, on whichever SMs.
    """

    num_sms: int
    semaphores: torch.Tensor
    layers_per_piece: int = 1


class StepGraph:
    """A step of up to num_tokens tokens of up to num_sequences sequences: of decodes alone, one token each, or mixed.

    block_tables: [at least num_sequences, blocks of the longest sequence] int32; logits: [at least num_sequences, vocab_size]. Both are on
    the device and shared by all graphs, as are `buffer`, [buffer_bytes of the largest] uint8, and the memory of `pool`: they run one after
    the other, on one stream. So are `embeddings`, [at least num_tokens, hidden_size], those of pictures; None: of a step that has none.
    stream: of the capture, whose SMs the graph has; None on a CPU. side: None of steps with the device for themselves.
    """

    def __init__(
        self,
        model: Llama,
        kv_cache: torch.Tensor,
        staging: Staging,
        block_tables: torch.Tensor,
        logits: torch.Tensor,
        buffer: torch.Tensor,
        embeddings: torch.Tensor | None,
        *,
        num_tokens: int,
        num_sequences: int,
        is_mixed: bool,
        pool: Any,
        stream: torch.cuda.Stream | None = None,
        side: Side | None = None,
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._staging = staging
        self._num_tokens = num_tokens
        self.num_sequences = num_sequences
        self._is_mixed = is_mixed
        self._piece = side.layers_per_piece if side is not None and is_mixed else None
        #: The arrays of a step are copied here; block tables are spread from here into `_block_tables`.
        self._buffer = buffer
        self._embeddings = embeddings
        self._num_axes = axes_of(model)
        self._block_tables = block_tables[:num_sequences]
        self._logits = logits[:num_sequences]
        static = self._upload(self._empty(block_tables.shape[1]))
        block_size = kv_cache.shape[3]
        max_context = block_tables.shape[1] * block_size
        self._inputs = ForwardInputs(
            token_ids=static.token_ids,
            positions=static.positions,
            slots=static.slots,
            rope_lens=static.rope_lens,
            rope_positions=static.rope_positions if self._num_axes else None,
            mixes=None,
            embeds=PlacedEmbeds(static.embed_sources, embeddings) if embeddings is not None else None,
            attention=CudaAttentionBatch(
                self._block_tables,
                static.query_starts,
                static.context_lens,
                block_size,
                num_tokens,
                num_tokens if is_mixed else 1,
                min(max_context, TYPICAL_CONTEXT)
                if is_mixed and model.device.type == "cuda"
                else max_context,
                semaphores=side.semaphores if side is not None else None,
                num_sms=side.num_sms if side is not None else None,
                max_prompts=MAX_PROMPTS,
            ),
            logit_rows=static.logit_rows if is_mixed else None,
            logit_attention=None,
        )
        #: One after the other; none on a CPU.
        self._graphs: list[torch.cuda.CUDAGraph] = []
        if stream is not None:
            self._graphs = captured(self._run, pool, stream)

    def replay(
        self,
        batch: ForwardBatch,
        sources: NDArray[np.int64] | None = None,
        previous: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits, [len(batch.logit_rows), vocab_size], valid until the next replay of any. See DeviceForward."""
        num_rows = len(batch.token_ids)
        num_sequences, num_blocks = batch.block_tables.shape
        arrays = self._empty(num_blocks)
        arrays.token_ids[:num_rows] = batch.token_ids.numpy()
        self._put_positions(batch, arrays)
        arrays.slots[:num_rows] = batch.slots.numpy()
        arrays.rope_lens[:num_rows] = (
            batch.rope_lens.numpy() if batch.rope_lens is not None else batch.positions.numpy() + 1
        )
        if batch.embeds is not None:
            arrays.embed_sources[batch.embeds.rows.numpy()] = np.arange(len(batch.embeds.rows))
            self._put_embeddings(batch.embeds)
        if self._is_mixed:
            arrays.logit_rows[: len(batch.logit_rows)] = batch.logit_rows.numpy()
            np.cumsum(batch.query_lens, out=arrays.query_starts[1 : num_sequences + 1])
            arrays.query_starts[num_sequences + 1 :] = num_rows
        arrays.context_lens[:num_sequences] = batch.context_lens
        arrays.block_tables[:num_sequences] = batch.block_tables
        if sources is not None:
            arrays.sources[:num_rows] = sources
        found = self._upload(arrays)
        self._block_tables[:, :num_blocks].copy_(found.block_tables)
        if sources is not None and previous is not None:
            found.token_ids.copy_(with_previous(found.token_ids, found.sources, previous))
        if sources is not None and self._model.ranks is not None:
            self._model.ranks.share(found.token_ids)
        if not self._graphs:
            self._run()
        for graph in self._graphs:
            graph.replay()
        return self._logits[: len(batch.logit_rows)]

    def _put_positions(self, batch: ForwardBatch, arrays: "_Arrays") -> None:
        """As the model turns heads by them: by one number, or by one for each axis."""
        num_rows, positions = len(batch.token_ids), batch.positions.numpy()
        moved = batch.rope_positions.numpy() if batch.rope_positions is not None else None
        if self._num_axes:
            arrays.rope_positions[:, :num_rows] = positions if moved is None else moved
        arrays.positions[:num_rows] = positions if moved is None else moved[0]

    def _put_embeddings(self, embeds: Embeds) -> None:
        assert self._embeddings is not None
        self._embeddings[: len(embeds.values)].copy_(embeds.values)

    def _run(self, cut: Callable[[], None] | None = None) -> None:
        """cut: called where a piece ends."""
        logits = self._model.compute(
            self._inputs,
            self._kv_cache,
            layer_group_size=self._piece,
            on_layers=(lambda _lo, _hi: cut()) if cut is not None and self._piece else None,
        )
        # A copy, or each graph would keep its own: of a large vocabulary they are as much as thousands of tokens of KV.
        self._logits.copy_(logits)

    def _upload(self, arrays: "_Arrays") -> "_Arrays":
        return _Arrays(*self._staging.upload(arrays, self._buffer))

    def _empty(self, num_blocks: int) -> "_Arrays":
        arrays = _empty(self._num_tokens, self.num_sequences, num_blocks, self._num_axes)
        if not self._is_mixed:
            arrays.query_starts[:] = np.arange(self.num_sequences + 1)
        return arrays


def captured(
    run: Callable[[Callable[[], None]], None], pool: Any, stream: torch.cuda.Stream
) -> list[torch.cuda.CUDAGraph]:
    """What `run` puts on the stream, as graphs that are to be replayed one after the other: it is given what ends one and begins the next.

    pool: of the memory that it computes in. Before that it is computed some times on the stream that is current.
    """
    for _ in range(NUM_WARM_UPS):
        run(_nothing)
    graphs: list[torch.cuda.CUDAGraph] = []

    def begin() -> None:
        graphs.append(torch.cuda.CUDAGraph())
        # Threads of NCCL may ask their events meanwhile.
        graphs[-1].capture_begin(pool=pool, capture_error_mode="thread_local")

    def cut() -> None:
        graphs[-1].capture_end()
        begin()

    torch.cuda.synchronize(stream.device)
    torch.cuda.empty_cache()
    with torch.cuda.stream(stream):
        begin()
        try:
            run(cut)
            graphs[-1].capture_end()
        except BaseException:
            with suppress(RuntimeError):
                graphs[-1].capture_end()
            # Who handles the error has this frame with it, and NCCL waits for graphs that have its collectives.
            graphs.clear()
            raise
    return graphs


def _nothing() -> None:
    pass


class _Arrays(NamedTuple):
    """What a step reads, on the host or on the device; fields as in ForwardInputs, PlacedEmbeds and CudaAttentionBatch. sources: see
    DeviceForward."""

    token_ids: Any
    positions: Any
    slots: Any
    rope_lens: Any
    rope_positions: Any
    embed_sources: Any
    sources: Any
    logit_rows: Any
    query_starts: Any
    context_lens: Any
    #: Last: what comes before is where it is however many blocks there are.
    block_tables: Any


def buffer_bytes(num_tokens: int, num_sequences: int, max_blocks: int, num_axes: int) -> int:
    """What the arrays of a step take, and less than those of any larger one."""
    return layout(_empty(num_tokens, num_sequences, max_blocks, num_axes))[1]


def axes_of(model: Llama) -> int:
    """Of the positions that heads are turned by, where there are several."""
    return NUM_AXES if model.config.rope.mrope_section else 0


def _empty(num_tokens: int, num_sequences: int, num_blocks: int, num_axes: int) -> _Arrays:
    """Of a step without sequences."""
    return _Arrays(
        token_ids=np.zeros(num_tokens, np.int64),
        positions=np.zeros(num_tokens, np.int64),
        slots=np.full(num_tokens, NO_SLOT, np.int64),
        rope_lens=np.zeros(num_tokens, np.int64),
        rope_positions=np.zeros((num_axes, num_tokens), np.int64),
        embed_sources=np.full(num_tokens, NO_EMBEDDING, np.int64),
        sources=np.full(num_tokens, FROM_HOST, np.int64),
        logit_rows=np.zeros(num_sequences, np.int64),
        query_starts=np.zeros(num_sequences + 1, np.int32),
        context_lens=np.zeros(num_sequences, np.int32),
        block_tables=np.zeros((num_sequences, num_blocks), np.int32),
    )


def with_previous(token_ids: torch.Tensor, sources: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """Tokens that were sampled on the device and that the host has not seen, in the place of those that it did not know."""
    return torch.where(sources >= 0, previous[sources.clamp(min=0)].clamp(min=0), token_ids)

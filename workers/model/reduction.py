"""A prompt with pictures whose embeddings leave it, layer by layer, when its text hardly attends to them.

`Llama.forward_filtering` computes it; here is who leaves, and who attends to what.
Source: MustDrop (arXiv 2411.10803), the stages in prefill and decode. Unlike there, tokens keep the positions that they have
in the whole prompt, and the KV of all layers, the first two included, is cut to the tokens that are left in the end: a
sequence has one table of blocks for all layers.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from phasewise_kernels.paged_attention.cuda import CudaAttentionBatch
from phasewise_kernels.paged_attention.op import AttentionBatch, paged_attention
from workers.api import ImageReduction
from workers.model.forward_batch import Embeds
from workers.model.selective import is_seen, slots_of

#: Scores of so many queries are in memory at once.
QUERY_BLOCK = 128


@dataclass(frozen=True, slots=True)
class FilteringBatch:
    """All tokens of one prompt, from its first; none of them has KV yet. Tensors are on the device of the weights."""

    #: [num_tokens] int64.
    token_ids: torch.Tensor
    #: See ForwardBatch, as are the next two.
    positions: torch.Tensor
    rope_positions: torch.Tensor | None
    rope_lens: torch.Tensor | None
    #: Those that stand for embeddings of pictures, and these.
    embeds: Embeds
    #: Which rows of `embeds` never leave, [num_embeds] bool.
    is_key: torch.Tensor
    #: Blocks of the sequence in order, [at least those of num_tokens] int32.
    block_table: NDArray[np.int32]
    block_size: int
    reduction: ImageReduction
    #: The last token needs logits.
    wants_logits: bool

    def on(self, device: torch.device) -> "FilteringBatch":
        """The same there. Waits for what runs on the current stream, as all of this does layer by layer."""
        if device == self.token_ids.device:
            return self
        embeds = Embeds(self.embeds.rows.to(device), self.embeds.values.to(device))
        return replace(
            self,
            token_ids=self.token_ids.to(device),
            positions=self.positions.to(device),
            rope_positions=self.rope_positions.to(device) if self.rope_positions is not None else None,
            rope_lens=self.rope_lens.to(device) if self.rope_lens is not None else None,
            embeds=embeds,
            is_key=self.is_key.to(device),
        )

    @property
    def logit_rows(self) -> slice:
        """Which of the rows that are left need logits: the last, or none."""
        return slice(-1, None) if self.wants_logits else slice(0, 0)

    def slots(self, places: torch.Tensor) -> torch.Tensor:
        """Where KV of these places of the sequence is, [num_places] int64."""
        return slots_of(places, self.block_table, self.block_size)

    def filter_layers(self, num_layers: int) -> frozenset[int]:
        """Layers after which rows may leave."""
        return filter_layers(self.reduction, num_layers)


@dataclass(frozen=True, slots=True)
class Filtered:
    """What a filtering forward pass leaves.

    logits: [1, vocab_size] of the dtype of the weights, or none. rows: of the batch that are left, ascending, [num_left] int64. layer_rows: how many
    each layer computed.
    """

    logits: torch.Tensor
    rows: torch.Tensor
    layer_rows: tuple[int, ...]


def filter_layers(reduction: ImageReduction, num_layers: int) -> frozenset[int]:
    """The layers that the fractions name, in a model of so many; the last is none of them, as nothing follows it."""
    if not reduction.is_filtering:
        return frozenset()
    return frozenset(round(part * num_layers) for part in reduction.layers) & frozenset(range(num_layers - 1))


@dataclass(frozen=True)
class LayerRows:
    """The rows of a batch that one layer computes: they have the first slots of the sequence there, in order."""

    batch: FilteringBatch
    #: [num_rows] int64, ascending.
    rows: torch.Tensor

    @cached_property
    def slots(self) -> torch.Tensor:
        """Where their KV is, [num_rows] int64."""
        return self.batch.slots(torch.arange(len(self.rows), device=self.rows.device))

    def slots_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Where KV of some of them is. rows: of the batch, ascending."""
        return self.slots[torch.searchsorted(self.rows, rows)]

    def attend(self, query: torch.Tensor, kv_cache: torch.Tensor, window: int) -> torch.Tensor:
        """Attention of all rows, or of the last alone, each to those up to itself.

        query: [all or 1, num_heads, head_dim]; kv_cache: [2, num_blocks, block_size, num_kv_heads, head_dim].
        """
        make = device_attention if query.is_cuda else host_attention
        batch = make(self.batch.block_table, len(query), len(self.rows), self.batch.block_size, query.device)
        return paged_attention(query, kv_cache[0], kv_cache[1], batch, window=window)

    def staying(self, query: torch.Tensor, keys: torch.Tensor, window: int) -> torch.Tensor:
        """Indices in `rows` of those that do not leave after this layer, ascending.

        query: [num_rows, num_heads, head_dim]; keys: [num_rows, num_kv_heads, head_dim].
        """
        batch, device = self.batch, self.rows.device
        is_picture = torch.zeros(len(batch.token_ids), dtype=torch.bool, device=device)
        is_picture[batch.embeds.rows] = True
        may_leave = is_picture.clone()
        may_leave[batch.embeds.rows[batch.is_key]] = False
        # Its logits are needed, even if it stands for a picture.
        may_leave[-1] = False
        pictures = is_picture[self.rows].nonzero()[:, 0]
        text = (~is_picture[self.rows]).nonzero()[:, 0]
        given, most = attention_given(query, keys, text, pictures, window)
        reduction = batch.reduction
        leaves = (given < reduction.global_threshold * given.sum()) & (most < reduction.individual_threshold)
        is_left = torch.ones(len(self.rows), dtype=torch.bool, device=device)
        is_left[pictures[leaves & may_leave[self.rows][pictures]]] = False
        return is_left.nonzero()[:, 0]


def host_attention(
    block_table: NDArray[np.int32], query_len: int, context_len: int, block_size: int, _device: torch.device
) -> AttentionBatch:
    """The last query_len of context_len tokens of one sequence, each to those up to itself."""
    return AttentionBatch.build(
        block_tables=block_table[None],
        query_lens=np.array([query_len]),
        context_lens=np.array([context_len]),
        block_size=block_size,
    )


def device_attention(
    block_table: NDArray[np.int32], query_len: int, context_len: int, block_size: int, device: torch.device
) -> CudaAttentionBatch:
    """The same on a GPU."""
    return CudaAttentionBatch(
        torch.from_numpy(np.ascontiguousarray(block_table[None], np.int32)).to(device),
        torch.tensor([0, query_len], dtype=torch.int32, device=device),
        torch.tensor([context_len], dtype=torch.int32, device=device),
        block_size,
        query_len,
        query_len,
        context_len,
        query_len,
    )


def attention_given(
    query: torch.Tensor, keys: torch.Tensor, givers: torch.Tensor, takers: torch.Tensor, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention that each of `takers` gets from all of `givers`, and from the one that gives it most; mean of heads.

    Both are indices of rows, ascending. query: [num_rows, num_heads, head_dim]; keys: [num_rows, num_kv_heads, head_dim].
    Returns [num_takers] fp32 twice.
    """
    num_heads, head_dim = query.shape[1:]
    grouped_keys = keys.transpose(0, 1)
    places = torch.arange(len(keys), device=keys.device)
    total, most = torch.zeros(2, len(takers), device=keys.device)
    for first in range(0, len(givers), QUERY_BLOCK):
        rows = givers[first : first + QUERY_BLOCK]
        # Query heads that share a KV head are further rows of it.
        grouped = query[rows].transpose(0, 1).reshape(len(grouped_keys), -1, head_dim)
        scores = (grouped @ grouped_keys.transpose(1, 2)).float().mul_(1 / math.sqrt(head_dim))
        scores = scores.view(num_heads, len(rows), -1)
        scores.masked_fill_(~is_seen(rows, places, window), float("-inf"))
        given = scores.softmax(dim=-1).mean(dim=0)[:, takers]
        total += given.sum(dim=0)
        most = torch.maximum(most, given.amax(dim=0))
    return total, most

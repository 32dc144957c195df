"""A prompt of which some KV is taken from elsewhere, and computed again only where that matters most.

`Llama.forward_selectively` computes it; here is what that takes and gives, and who attends to what in it.
Source: KVShare (arXiv 2503.16525), prefill stage; CacheBlend (EuroSys'25) for the layer at which tokens are chosen.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from phasewise_kernels.paged_attention.op import AttentionBatch, paged_attention
from phasewise_kernels.paged_attention.torch_path import Chunk, attend_chunk

#: Layers before this one are computed for all tokens; by its K, V and attention tokens are chosen for those after it.
CHECK_LAYER = 1


@dataclass(frozen=True, slots=True)
class Reused:
    """Tokens of a sequence that have KV elsewhere, by ascending position."""

    #: Where they are in the sequence, [num_reused] int64.
    positions: torch.Tensor
    #: block_id * block_size + offset where their KV is, [num_reused] int64.
    source_slots: torch.Tensor
    #: What position its keys are rotated for, [num_reused] int64.
    source_positions: torch.Tensor

    def __len__(self) -> int:
        return len(self.positions)

    def without(self, indices: torch.Tensor) -> "Reused":
        """All but these."""
        is_left = torch.ones(len(self), dtype=torch.bool).index_fill_(0, indices, False)
        return Reused(self.positions[is_left], self.source_slots[is_left], self.source_positions[is_left])


def slots_of(places: torch.Tensor, block_table: NDArray[np.int32], block_size: int) -> torch.Tensor:
    """Where KV of these places of a sequence is, [num_places] int64, on their device. block_table: its blocks in order."""
    blocks = torch.from_numpy(block_table.astype(np.int64)).to(places.device)
    return blocks[places // block_size] * block_size + places % block_size


@dataclass(frozen=True, slots=True)
class SelectiveBatch:
    """The tokens `[start, context_len)` of one sequence; those before `start` have their KV in its blocks.

    Reused tokens are among them; the last token is not.
    """

    #: [num_tokens] int64.
    token_ids: torch.Tensor
    start: int
    #: Blocks of the sequence in order, [at least those of context_len] int32.
    block_table: NDArray[np.int32]
    block_size: int
    reused: Reused

    @property
    def context_len(self) -> int:
        """All tokens of the sequence."""
        return self.start + len(self.token_ids)

    @property
    def positions(self) -> torch.Tensor:
        """Place of each token in its sequence, [num_tokens] int64."""
        return torch.arange(self.start, self.context_len)

    def slots(self, positions: torch.Tensor) -> torch.Tensor:
        """Where KV of these positions of the sequence is, [num_positions] int64."""
        return slots_of(positions, self.block_table, self.block_size)


@dataclass(frozen=True, slots=True)
class CheckedLayer:
    """The layer at which tokens are chosen: what it computed, and what is known from elsewhere.

    Queries are of all tokens of the batch; K and V are [num_reused, num_kv_heads, head_dim] of those that are reused.
    """

    batch: SelectiveBatch
    #: [num_tokens, num_heads, head_dim], rotated.
    query: torch.Tensor
    #: Of all tokens of the sequence, [context_len, num_kv_heads, head_dim], as computed; not to be changed.
    keys: torch.Tensor
    k_computed: torch.Tensor
    #: Moved to where the token is now.
    k_reused: torch.Tensor
    v_computed: torch.Tensor
    v_reused: torch.Tensor
    #: See ModelConfig.window.
    window: int


#: Which reused tokens are computed again: indices into `batch.reused`, [any number] int64, each once.
Choose = Callable[[CheckedLayer], torch.Tensor]


def rows_to_compute(batch: SelectiveBatch, kept: Reused) -> torch.Tensor:
    """Rows of all tokens but those that keep what they have elsewhere, [num_rows] int64, ascending."""
    is_computed = torch.ones(len(batch.token_ids), dtype=torch.bool)
    is_computed[kept.positions - batch.start] = False
    return is_computed.nonzero()[:, 0]


@dataclass(frozen=True, slots=True)
class RowAttention:
    """Attention of some rows of a batch, each to all tokens of the sequence up to itself."""

    batch: SelectiveBatch
    #: [num_rows] int64, ascending.
    rows: torch.Tensor
    _chunks: dict[int, Chunk] = field(default_factory=dict, compare=False, repr=False)
    _whole: list[AttentionBatch] = field(default_factory=list, compare=False, repr=False)

    def attend(self, query: torch.Tensor, kv_cache: torch.Tensor, window: int) -> torch.Tensor:
        """query: [num_rows, num_heads, head_dim]; kv_cache: [2, num_blocks, block_size, num_kv_heads, head_dim].

        Returns [num_rows, num_heads, head_dim].
        """
        first, last = int(self.rows[0]), int(self.rows[-1])
        if last - first + 1 == len(self.rows):
            # As any other chunk of a prompt, to the same bits.
            return paged_attention(query, kv_cache[0], kv_cache[1], self._as_chunk(last + 1), window=window)
        if window not in self._chunks:
            self._chunks[window] = self._masked(window)
        return attend_chunk(query, kv_cache[0].flatten(0, 1), kv_cache[1].flatten(0, 1), self._chunks[window])

    def _as_chunk(self, end: int) -> AttentionBatch:
        if not self._whole:
            batch = AttentionBatch.build(
                block_tables=self.batch.block_table[None],
                query_lens=np.array([len(self.rows)]),
                context_lens=np.array([self.batch.start + end]),
                block_size=self.batch.block_size,
            )
            self._whole.append(batch)
        return self._whole[0]

    def _masked(self, window: int) -> Chunk:
        queries = self.rows + self.batch.start
        low = max(0, int(queries[0]) - window + 1) if window else 0
        places = torch.arange(low, int(queries[-1]) + 1)
        mask = torch.zeros(len(queries), len(places)).masked_fill_(
            ~is_seen(queries, places, window), float("-inf")
        )
        return Chunk(0, len(queries), self.batch.slots(places), mask)


def is_seen(queries: torch.Tensor, places: torch.Tensor, window: int) -> torch.Tensor:
    """Whether a token at one position sees that at another, [num_queries, num_places] bool; window as in ModelConfig."""
    seen = places[None] <= queries[:, None]
    return seen & (places[None] > queries[:, None] - window) if window else seen

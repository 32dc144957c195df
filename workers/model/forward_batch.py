"""What one forward pass computes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from phasewise_kernels.paged_attention.cuda import CudaAttentionBatch
from phasewise_kernels.paged_attention.op import AttentionBatch


@dataclass(frozen=True, slots=True)
class Mixes:
    """Rows whose embedding is a weighted sum over several tokens."""

    #: Indices into token_ids, whose tokens there are not read, [num_mixes] int64.
    rows: torch.Tensor
    #: [num_mixes, k] int64.
    token_ids: torch.Tensor
    #: [num_mixes, k] fp32.
    weights: torch.Tensor


@dataclass(frozen=True, slots=True)
class Embeds:
    """Rows whose embedding is given: those of pictures."""

    #: Indices into token_ids, whose tokens there are not read, [num_embeds] int64.
    rows: torch.Tensor
    #: [num_embeds, hidden_size] fp32.
    values: torch.Tensor


@dataclass(frozen=True, slots=True)
class PlacedEmbeds:
    """The same where it is not known beforehand how many there are, as in a step that is captured."""

    #: Which of the values is the embedding of each row, [num_tokens] int64; below 0: that of its token.
    sources: torch.Tensor
    #: [num_values, hidden_size] of the dtype of the weights.
    values: torch.Tensor


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """The tokens of one step: those of sequence 0, then of sequence 1, and so on. At least one token."""

    #: [num_tokens] int64.
    token_ids: torch.Tensor
    #: Place of each token in its sequence, [num_tokens] int64; siblings in a tree share theirs.
    positions: torch.Tensor
    #: block_id * block_size + offset where K and V of each token are written, [num_tokens] int64.
    slots: torch.Tensor
    #: Per sequence: its blocks in order, [num_sequences, max_blocks] int32, padded with anything.
    block_tables: NDArray[np.int32]
    #: Per sequence: the tokens of this step, [num_sequences] int64.
    query_lens: NDArray[np.int64]
    #: Per sequence: all tokens, those of this step included, [num_sequences] int64.
    context_lens: NDArray[np.int64]
    #: Which tokens need logits, [num_rows] int64 indices into token_ids.
    logit_rows: torch.Tensor
    #: Length of sequence that each token's rotation is for, [num_tokens] int64; None is positions + 1.
    #: It matters to dynamic scaling alone, whose frequencies follow it.
    rope_lens: torch.Tensor | None = None
    #: By index of sequence: which of its tokens of this step see which, [query_len, query_len] bool, row sees
    #: column. They see all earlier tokens. Their slots are the last ones of the context, in order.
    tree_masks: Mapping[int, NDArray[np.bool_]] = field(default_factory=dict)
    mixes: Mixes | None = None
    embeds: Embeds | None = None
    #: Positions in time, height and width, [3, num_tokens] int64; None: `positions` in all three. Without M-RoPE the
    #: three are the same, and differ from `positions` when tokens before them have left the prompt.
    rope_positions: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class ForwardInputs:
    """The same as the forward pass reads it, on the device of the weights. Fields as in ForwardBatch."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    #: Below 0: a row of padding, whose K and V are not written.
    slots: torch.Tensor
    rope_lens: torch.Tensor | None
    rope_positions: torch.Tensor | None
    mixes: Mixes | None
    embeds: Embeds | PlacedEmbeds | None
    attention: AttentionBatch | CudaAttentionBatch
    #: None: all of them, in order.
    logit_rows: torch.Tensor | None
    #: Of the rows that need logits alone, for the last layer; None when it computes all rows.
    logit_attention: AttentionBatch | CudaAttentionBatch | None

    @property
    def num_logit_rows(self) -> int:
        """Rows of logits."""
        return len(self.token_ids if self.logit_rows is None else self.logit_rows)


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Some tokens of a batch as sequences of one new token each, which end there."""

    block_tables: NDArray[np.int32]
    #: [num_rows] int64.
    context_lens: NDArray[np.int64]


def logit_row_batch(batch: ForwardBatch) -> RowBatch | None:
    """The rows that need logits, for attention of theirs alone; None where that of all rows serves them too.

    A row alone is a sequence with one new token that ends there. That is worth it when few rows are needed; in a tree what
    a row sees is not the context up to it.
    """
    rows: NDArray[np.int64] = batch.logit_rows.numpy()
    is_few = 0 < len(rows) <= len(batch.query_lens) < len(batch.token_ids)
    if not is_few or batch.tree_masks:
        return None
    ends = np.cumsum(batch.query_lens)
    sequences = np.searchsorted(ends, rows, side="right")
    return RowBatch(
        batch.block_tables[sequences], batch.context_lens[sequences] - (ends[sequences] - 1 - rows)
    )

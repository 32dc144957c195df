"""A StepPlan as the tensors of one forward pass, and which of its rows are whose."""

from collections.abc import Iterator
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray

from workers.engine.sequence import Sequence
from workers.engine.span_reuse.rule import SpanReuse
from workers.engine.step_plan import Slice, StepPlan
from workers.model.forward_batch import Embeds, ForwardBatch, Mixes
from workers.model.reduction import FilteringBatch
from workers.model.selective import Reused, SelectiveBatch

#: Rows, blocks of their tile in the embedding pool, and which of its embeddings is the first.
EmbeddedRows = tuple[range, tuple[int, ...], int]


class StepBatch:
    """Rows of tokens: each decode with its drafts, then the chunks. Rows of logits: each decode with its drafts, then
    the last of each chunk that yields a token, then the rows that score prompts.

    Chunks that reuse spans or are filtered are no part of `forward`: each is computed for itself, and its row of logits
    comes after those of the other chunks.

    Loops are over sequences and do one thing each; what is per token is done by numpy.
    """

    def __init__(self, plan: StepPlan, block_size: int) -> None:
        self.plan = plan
        #: Sequences that get a token, in the order of StepResult.token_ids.
        self.sampled: list[Sequence] = [
            *plan.decodes,
            *(part.sequence for part in plan.chunks if part.yields_token),
        ]
        #: Those that ask for more than a token: indices in `sampled`.
        self.special = [
            i
            for i, one in enumerate(self.sampled)
            if one.sampling.num_logprobs is not None
            or one.sampling.decoding is not None
            or one.sampling.grammar is not None
        ]
        num_rows = [1] * len(self.sampled)
        for i, tree in plan.drafts.items():
            num_rows[i] += tree.num_drafts
        self._num_rows = num_rows
        #: Row of logits of each of `sampled`; its drafts follow.
        self.first_rows = [end - num for end, num in zip(accumulate(num_rows), num_rows, strict=True)]
        self.num_sampled_rows = sum(num_rows)
        self._chunks = [part for part in plan.chunks if not part.is_alone]
        #: None when there is nothing but chunks that are computed for themselves.
        self.forward = self._forward(block_size) if plan.decodes or self._chunks else None
        #: Chunks that reuse spans, with the part of what is reused that is computed again.
        self.selective = [
            (_selective_batch(plan, part, part.reuse, block_size), part.reuse.recompute_fraction)
            for part in plan.chunks
            if part.reuse is not None
        ]
        self._block_size = block_size

    @property
    def filtered(self) -> list[tuple[int, Slice]]:
        """Chunks that are filtered, with their indices in the plan."""
        return [(i, part) for i, part in enumerate(self.plan.chunks) if part.is_filtered]

    @property
    def sequence_of_rows(self) -> list[Sequence]:
        """Whose row of logits is which, of those that are sampled."""
        return [one for one, num in zip(self.sampled, self._num_rows, strict=True) for _ in range(num)]

    def num_rows_of(self, index: int) -> int:
        """Rows of one of `sampled`: its own, and its drafts'."""
        return self._num_rows[index]

    def embedded_rows(self) -> Iterator[EmbeddedRows]:
        """Rows of `forward` that stand for embeddings."""
        first_row = sum(self._num_rows[: len(self.plan.decodes)])
        for part in self._chunks:
            yield from embedded_rows(part, first_row)
            first_row += part.end - part.start

    def filtering_batch(self, part: Slice, embeds: Embeds) -> FilteringBatch:
        """A chunk that is filtered, with the embeddings of all its pictures."""
        sequence, images = part.sequence, part.sequence.images
        assert images is not None
        assert sequence.reduction is not None
        assert part.start == 0
        flags = [flag for i in images.overlapping(0, part.end) for flag in images.key_flags(i)]
        positions = torch.arange(part.end)
        rope_positions = None
        if images.position_delta is not None:
            rope_positions = torch.from_numpy(images.positions(0, part.end).copy())
        return FilteringBatch(
            token_ids=torch.tensor(sequence.token_ids[: part.end]),
            positions=positions,
            rope_positions=rope_positions,
            rope_lens=torch.full_like(positions, part.end + sequence.num_dropped_tokens),
            embeds=embeds,
            is_key=torch.tensor(flags),
            block_table=self.plan.block_tables[sequence.row, : len(sequence.block_table)],
            block_size=self._block_size,
            reduction=sequence.reduction,
            wants_logits=part.yields_token,
        )

    def _forward(self, block_size: int) -> ForwardBatch:
        plan = self.plan
        sequences = [*plan.decodes, *(part.sequence for part in self._chunks)]
        num_decodes = len(plan.decodes)
        query_lens = np.array(
            [*self._num_rows[:num_decodes], *(part.end - part.start for part in self._chunks)], np.int64
        )
        starts = np.array(
            [len(one.token_ids) - 1 for one in plan.decodes] + [part.start for part in self._chunks], np.int64
        )
        # Row of the first token of each sequence.
        first_rows = np.cumsum(query_lens) - query_lens
        # Where a token's KV is in its sequence; also its position, but for drafts.
        places = np.arange(query_lens.sum()) + np.repeat(starts - first_rows, query_lens)
        rows = np.array([one.row for one in sequences])
        blocks = plan.block_tables[np.repeat(rows, query_lens), places // block_size]
        context_lens = starts + query_lens
        num_blocks = -(-int(context_lens.max()) // block_size)
        positions, tree_masks = places, {}
        if plan.drafts:
            positions = places.copy()
            for i, tree in plan.drafts.items():
                first = first_rows[i]
                offsets = np.array(tree.position_offsets)
                positions[first : first + len(offsets)] = starts[i] + offsets
                tree_masks[i] = tree.mask()
        # What an earlier attempt generated counts as generated, so that a failover changes no angle.
        prompt_lens = np.repeat([one.num_own_tokens for one in sequences], query_lens)
        num_dropped = np.repeat([one.num_dropped_tokens for one in sequences], query_lens)
        return ForwardBatch(
            token_ids=torch.tensor(self._token_ids()),
            positions=torch.from_numpy(positions),
            slots=torch.from_numpy(blocks.astype(np.int64) * block_size + places % block_size),
            block_tables=plan.block_tables[rows, :num_blocks],
            query_lens=query_lens,
            context_lens=context_lens,
            logit_rows=torch.tensor(self._logit_rows(first_rows), dtype=torch.int64),
            rope_lens=torch.from_numpy(np.maximum(prompt_lens, positions + 1) + num_dropped),
            tree_masks=tree_masks,
            mixes=self._mixes(first_rows),
            rope_positions=self._rope_positions(sequences, positions, first_rows, query_lens),
        )

    def _rope_positions(
        self,
        sequences: list[Sequence],
        positions: NDArray[np.int64],
        first_rows: NDArray[np.int64],
        query_lens: NDArray[np.int64],
    ) -> torch.Tensor | None:
        """Positions where those of some prompt follow its pictures (M-RoPE), or tokens have left it, [3, num_tokens].

        None: all are places.
        """
        moved = [
            (i, one.images, one.images.position_delta)
            for i, one in enumerate(sequences)
            if one.images is not None and one.images.position_delta is not None
        ]
        if not moved:
            return None
        result = np.broadcast_to(positions, (3, len(positions))).copy()
        for i, images, delta in moved:
            rows = slice(first_rows[i], first_rows[i] + query_lens[i])
            if i < len(self.plan.decodes):
                # Generated, or drafted: after all pictures.
                result[:, rows] += delta
            else:
                first = int(positions[first_rows[i]])
                result[:, rows] = images.positions(first, first + int(query_lens[i]))
        return torch.from_numpy(result)

    def _token_ids(self) -> list[int]:
        plan = self.plan
        token_ids = [one.token_ids[-1] for one in plan.decodes]
        for i in sorted(plan.drafts, reverse=True):
            token_ids[i + 1 : i + 1] = plan.drafts[i].token_ids
        for part in self._chunks:
            token_ids += part.sequence.token_ids[part.start : part.end]
        return token_ids

    def _logit_rows(self, first_rows: NDArray[np.int64]) -> list[int]:
        plan = self.plan
        num_decodes = len(plan.decodes)
        rows = list(range(sum(self._num_rows[:num_decodes])))
        scored: list[int] = []
        for part, first_row in zip(self._chunks, first_rows[num_decodes:].tolist(), strict=True):
            if part.yields_token:
                rows.append(first_row + part.end - part.start - 1)
            # A token is scored by the row of the one before it.
            scored += [first_row + position - 1 - part.start for position in part.scored_positions]
        return rows + scored

    def _mixes(self, first_rows: NDArray[np.int64]) -> Mixes | None:
        mixed = [(i, one.mix) for i, one in enumerate(self.plan.decodes) if one.mix is not None]
        if not mixed:
            return None
        width = max(len(mix[0]) for _, mix in mixed)
        token_ids = torch.zeros(len(mixed), width, dtype=torch.int64)
        weights = torch.zeros(len(mixed), width)
        for j, (_, mix) in enumerate(mixed):
            token_ids[j, : len(mix[0])] = torch.tensor(mix[0])
            weights[j, : len(mix[1])] = torch.tensor(mix[1])
        rows = torch.from_numpy(first_rows[[i for i, _ in mixed]])
        return Mixes(rows, token_ids, weights)


def embedded_rows(part: Slice, first_row: int) -> Iterator[EmbeddedRows]:
    """Rows of one chunk that stand for embeddings; its first row is `first_row`."""
    images = part.sequence.images
    for i in images.overlapping(part.start, part.end) if images is not None else ():
        assert images is not None
        tile = images.placed[i]
        lo = max(part.start, tile.start)
        hi = min(part.end, tile.start + tile.num_embeddings)
        rows = range(first_row + lo - part.start, first_row + hi - part.start)
        yield rows, images.block_ids[i], lo - tile.start


def _selective_batch(plan: StepPlan, part: Slice, reuse: SpanReuse, block_size: int) -> SelectiveBatch:
    """The tokens of one chunk, and where the KV of its spans is."""
    sequence = part.sequence
    positions, slots, old_positions = [], [], []
    for span in reuse.spans:
        steps = np.arange(span.num_tokens)
        places = span.offset + steps
        positions.append(span.start + steps)
        slots.append(np.array(span.block_ids)[places // block_size] * block_size + places % block_size)
        old_positions.append(span.old_start + steps)
    reused = Reused(*(torch.from_numpy(np.concatenate(some)) for some in (positions, slots, old_positions)))
    return SelectiveBatch(
        token_ids=torch.tensor(sequence.token_ids[part.start : part.end]),
        start=part.start,
        block_table=plan.block_tables[sequence.row, : len(sequence.block_table)],
        block_size=block_size,
        reused=reused,
    )

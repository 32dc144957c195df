"""What a step computes: decodes, and slices of prompts. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from workers.engine.decoding.draft_tree import DraftTree
from workers.engine.flights import Flight
from workers.engine.host_tier import PackedBlock
from workers.engine.sequence import Sequence
from workers.engine.span_reuse.rule import SpanReuse


@dataclass(frozen=True, slots=True)
class Slice:
    """The tokens `[start, end)` of one sequence, to be computed in this step."""

    sequence: Sequence
    start: int
    end: int
    #: KV of other contexts that some of them take; None computes all.
    reuse: SpanReuse | None = None
    #: Embeddings of its pictures leave the prompt while it is computed.
    is_filtered: bool = False

    @property
    def is_alone(self) -> bool:
        """It has a forward pass of its own."""
        return self.reuse is not None or self.is_filtered

    @property
    def num_rows(self) -> int:
        """Tokens that are computed in all layers."""
        return self.end - self.start - (self.reuse.num_saved if self.reuse is not None else 0)

    @property
    def yields_token(self) -> bool:
        """The last known token is among them, so the next one can be sampled."""
        return self.end == len(self.sequence.token_ids)

    @property
    def scored_positions(self) -> range:
        """Tokens of the prompt whose logprobs are asked for and come out of this slice: each by the one before it."""
        sequence = self.sequence
        if sequence.sampling.num_prompt_logprobs is None:
            return range(0)
        return range(
            max(self.start + 1, sequence.num_scored_tokens), min(self.end + 1, sequence.num_prompt_tokens)
        )


@dataclass
class StepPlan:
    """One forward pass."""

    #: Each computes its last known token, and yields the next.
    decodes: list[Sequence]
    #: Chunks of prompts, or of sequences that were preempted. Those that reuse spans come last, and after them those
    #: that are filtered.
    chunks: tuple[Slice, ...]
    #: Blocks of each sequence, in the row that it has; see Batch.
    block_tables: NDArray[np.int32]
    #: Sequences that leave the waiting queue with this step, and those that came back to it.
    admitted: tuple[Sequence, ...] = ()
    preempted: tuple[Sequence, ...] = ()
    #: Waiting sequences that have not asked for all embeddings that they need, since KV that was known is gone, with the
    #: tokens that are known now.
    imageless: tuple[tuple[Sequence, int], ...] = ()
    #: Block -> the block whose contents it gets before anything is computed.
    copies: Mapping[int, int] = field(default_factory=dict)
    #: Block -> packed KV that it gets after the copies and before anything is computed.
    restores: Mapping[int, PackedBlock] = field(default_factory=dict)
    #: Index in `decodes` -> guessed tokens that are verified with it.
    drafts: Mapping[int, DraftTree] = field(default_factory=dict)
    #: Blocks that are told of as computed when it has run.
    pending: tuple[int, ...] = ()
    #: When it began, in seconds: when it was planned, or the step before it had ended.
    began_s: float = 0.0
    #: KV that is handed off leaves whenever so many layers are computed; None: when all are.
    layer_group_size: int | None = None
    #: Of a step that runs beside another one; see Engine.schedule.
    flight: Flight | None = None

    @cached_property
    def slices(self) -> tuple[Slice, ...]:
        """All of it, decodes first, as of the first time of asking. Drafts are not counted."""
        decodes = [Slice(one, one.num_computed_tokens, len(one.token_ids)) for one in self.decodes]
        return (*decodes, *self.chunks)

    @property
    def num_tokens(self) -> int:
        """Tokens computed by the step, without drafts and without what is reused."""
        return len(self.decodes) + sum(part.num_rows for part in self.chunks)

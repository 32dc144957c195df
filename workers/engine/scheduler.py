"""What the next step computes. Pure.

Decodes first (one token each), then prefills that have begun, then new ones in order of arrival, all
within one token budget: a long prompt is cut into chunks and never stalls a decode.
Source: Sarathi-Serve (OSDI'24), stall-free batching, section 4.2.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from kvtransfer.layout import blocks_needed
from workers.api import EngineConfig
from workers.engine.block_pool import BlockPool
from workers.engine.sequence import Sequence, SequenceState


@dataclass(frozen=True, slots=True)
class Slice:
    """The tokens `[start, end)` of one sequence, to be computed in this step."""

    sequence: Sequence
    start: int
    end: int

    @property
    def yields_token(self) -> bool:
        """The last known token is among them, so the next one can be sampled."""
        return self.end == len(self.sequence.token_ids)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass. `admitted` are the sequences that leave the waiting queue with it."""

    slices: tuple[Slice, ...]
    admitted: tuple[Sequence, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens computed by the step."""
        return sum(part.end - part.start for part in self.slices)


def schedule(
    running: Iterable[Sequence],
    waiting: Iterable[Sequence],
    pool: BlockPool,
    config: EngineConfig,
    *,
    num_places: int,
) -> StepPlan:
    """Plan one step; changes nothing.

    running: sequences in PREFILL or DECODE, in order of admission; waiting: in order of arrival.
    num_places: sequences that may run; the rest of the batch is kept for KV on its way. A waiting sequence is admitted when blocks for all that it may grow to are free, so a running one
    never runs out of them. The queue's head is never overtaken.
    """
    budget = config.token_budget
    free_blocks = pool.num_free
    slices: list[Slice] = []
    prefills: list[Sequence] = []
    num_running = 0
    for sequence in running:
        num_running += 1
        if sequence.state is SequenceState.PREFILL:
            prefills.append(sequence)
        elif budget > 0:
            slices.append(Slice(sequence, sequence.num_computed_tokens, len(sequence.token_ids)))
            budget -= 1
    for sequence in prefills:
        budget -= _add_chunk(slices, sequence, budget, config.block_size)
    admitted: list[Sequence] = []
    for sequence in waiting:
        num_blocks = blocks_needed(sequence.max_tokens_here, config.block_size)
        if num_running >= num_places or num_blocks > free_blocks:
            break
        taken = _add_chunk(slices, sequence, budget, config.block_size)
        if taken == 0:
            break
        budget -= taken
        free_blocks -= num_blocks
        num_running += 1
        admitted.append(sequence)
    return StepPlan(tuple(slices), tuple(admitted))


def _add_chunk(slices: list[Slice], sequence: Sequence, budget: int, block_size: int) -> int:
    """Append the next chunk of a prompt; returns its tokens, 0 if the budget does not reach.

    A chunk that does not finish the prompt ends at a block border: then every block is sent to the
    decode worker once, when it is full.
    """
    num_tokens = sequence.num_uncomputed_tokens
    if num_tokens > budget:
        num_tokens = budget - budget % block_size
    if num_tokens > 0:
        start = sequence.num_computed_tokens
        slices.append(Slice(sequence, start, start + num_tokens))
    return num_tokens

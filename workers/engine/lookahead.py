"""A step that is planned while the one before it runs. Pure.

The tokens of the running step are not known yet, but mostly what follows from them is: each sequence that generates has one
token more. So that is assumed, for as long as the next step is planned and its inputs are made; what stands for the token that
is not known is taken from the device, where it will be. Then the assumption is taken back, and the running step is completed as
ever. A sequence that turns out to have ended has a row too many in the next step, of which nothing is taken.

Nothing is assumed while anything runs whose next step needs the token itself: penalties, grammars, drafts and the like; nor while
pictures get fewer embeddings, since a prompt then has as many tokens as are left when it has been computed.
"""

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

from workers.engine.batch import Batch
from workers.engine.sampling.rows import is_plain
from workers.engine.sequence import Sequence, SequenceState
from workers.engine.step_plan import StepPlan
from workers.engine.step_result import StepResult

#: Stands in `token_ids` for a token that is not known; any that a model has.
ASSUMED_TOKEN = 0


class Lookahead:
    """What is assumed of the sequences of one batch."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._grown: list[Sequence] = []
        self._begun: list[tuple[Sequence, int]] = []
        self._hidden: list[Sequence] = []
        #: Whether anything is assumed now.
        self.is_on = False

    def assume(self, running: StepPlan) -> bool:
        """That each sequence of the running step has its token and goes on; False, and nothing is, when that says too little."""
        batch = self._batch
        if batch.branched or not all(
            is_plain(one.sampling) and one.reduction is None for one in (*batch.decodes, *batch.prefills)
        ):
            return False
        going = [one for one in running.decodes if one.state is SequenceState.DECODE]
        if batch.num_blocks_for_decodes(1) > batch.pool.num_available:
            # Somebody would have to be preempted, and begin again from tokens that are not known.
            return False
        self.is_on = True
        for part in running.chunks:
            sequence = part.sequence
            if sequence.state is SequenceState.PREFILL and sequence.num_computed_tokens == part.start:
                self._begun.append((sequence, part.start))
                sequence.num_computed_tokens = part.end
        for sequence in going:
            if len(sequence.token_ids) + 1 >= sequence.max_tokens:
                # It ends with this token, whatever it is.
                self._hidden.append(sequence)
            else:
                self._grown.append(sequence)
                sequence.num_computed_tokens = len(sequence.token_ids)
                sequence.token_ids.append(ASSUMED_TOKEN)
        if self._hidden:
            hidden = set(self._hidden)
            batch.decodes[:] = [one for one in batch.decodes if one not in hidden]
        return True

    def take_back(self) -> None:
        """All is as before, but for what the plan that was made meanwhile has changed."""
        for sequence in self._grown:
            sequence.token_ids.pop()
            sequence.num_computed_tokens = len(sequence.token_ids) - 1
        for sequence, start in self._begun:
            sequence.num_computed_tokens = start
        self._batch.decodes.extend(self._hidden)
        self._grown, self._begun, self._hidden = [], [], []
        self.is_on = False


def entries_of(plan: StepPlan) -> tuple[int, ...]:
    """Which run of its sequence each slice is a part of; see `still_there`."""
    return tuple(one.num_entries for one in _sequences(plan))


def sources_of(running: StepPlan, decodes: SequenceOf[Sequence], no_source: int) -> list[int]:
    """Index in the running step's tokens of the last token of each of these sequences; no_source where it is known."""
    sampled = [*running.decodes, *(part.sequence for part in running.chunks if part.yields_token)]
    index = {one: i for i, one in enumerate(sampled)}
    return [index.get(one, no_source) for one in decodes]


def still_there(plan: StepPlan, entries: SequenceOf[int], result: StepResult) -> tuple[StepPlan, StepResult]:
    """The step without those that ended, left or began again while it ran, of which nothing is taken."""
    is_there = [
        one.num_entries == entry and one.state in (SequenceState.DECODE, SequenceState.PREFILL)
        for one, entry in zip(_sequences(plan), entries, strict=True)
    ]
    if all(is_there):
        return plan, result
    num_decodes = len(plan.decodes)
    decodes, chunks = is_there[:num_decodes], is_there[num_decodes:]
    yields = [kept for part, kept in zip(plan.chunks, chunks, strict=True) if part.yields_token]
    tokens = _kept([*decodes, *yields])
    parts = _kept(chunks)
    return (
        replace(
            plan,
            decodes=[one for one, kept in zip(plan.decodes, decodes, strict=True) if kept],
            chunks=tuple(part for part, kept in zip(plan.chunks, chunks, strict=True) if kept),
        ),
        StepResult(
            [result.token_ids[i] for i in tokens],
            {tokens[i]: detail for i, detail in result.details.items() if i in tokens},
            {parts[i]: found for i, found in result.prompt_logprobs.items() if i in parts},
            {parts[i]: found for i, found in result.filtered.items() if i in parts},
            result.device_s,
        ),
    )


def _kept(is_kept: Iterable[bool]) -> dict[int, int]:
    """Old index of those that are kept -> new index, in order."""
    kept = [i for i, one in enumerate(is_kept) if one]
    return {old: new for new, old in enumerate(kept)}


def _sequences(plan: StepPlan) -> list[Sequence]:
    return [*plan.decodes, *(part.sequence for part in plan.chunks)]

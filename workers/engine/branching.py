"""Cautious decoding in the engine: forks where the model is unsure, and what becomes of the branches. Pure.

Source: CNTP (arXiv 2507.03038); the choice among branches is `decoding.cautious`.
"""

from dataclasses import dataclass

from kvtransfer.layout import blocks_needed
from workers.api import CautiousDecoding
from workers.engine.batch import Batch
from workers.engine.decoding.cautious import BranchSet
from workers.engine.sequence import NO_ROW, Sequence, SequenceState


@dataclass(frozen=True, slots=True)
class _Fork:
    branches: tuple[Sequence, ...]
    choice: BranchSet


class Branching:
    """The branched sequences of one engine. punctuation: tokens that end a branch."""

    def __init__(self, batch: Batch, punctuation: frozenset[int]) -> None:
        self._batch = batch
        self._punctuation = punctuation
        self._forks: dict[Sequence, _Fork] = {}

    def begin(self, sequence: Sequence, starts: tuple[tuple[int, float], ...]) -> bool:
        """Split a decoding sequence into branches with these first tokens and their warped logprobs.

        False when blocks are short: it then goes on with the first of them.
        """
        params = sequence.sampling.decoding
        assert isinstance(params, CautiousDecoding)
        max_tokens = sequence.max_tokens - len(sequence.token_ids)
        num_known = len(sequence.token_ids) + min(params.max_branch_tokens, max_tokens)
        size = self._batch.pool.block_size
        num_own = blocks_needed(num_known, size) - len(sequence.token_ids) // size
        kept_for_others = self._batch.num_reserved_blocks() - self._batch.reserved_blocks(sequence)
        if len(starts) * num_own > self._batch.pool.num_available - kept_for_others:
            return False
        self._batch.move(sequence, SequenceState.BRANCHED)
        choice = BranchSet(
            params,
            starts,
            punctuation=self._punctuation,
            stop_token_ids=sequence.stop_token_ids,
            max_tokens=max_tokens,
        )
        branches = []
        for stream, (token_id, _) in enumerate(starts):
            branch = self._batch.fork(sequence, stream=stream)
            branch.token_ids.append(token_id)
            if stream in choice.open_branches:
                # All at once: a branch never waits for a block. One that has ended needs no copy of the last block,
                # whose original might be gone before the next step.
                self._batch.grow(branch, num_known)
            branches.append(branch)
        self._forks[sequence] = _Fork(tuple(branches), choice)
        self._settle(sequence)
        return True

    def add(self, branch: Sequence, token_id: int, logprob: float) -> None:
        """The next token of a branch. What comes after its last is ignored."""
        assert branch.parent is not None
        fork = self._forks[branch.parent]
        if branch.stream in fork.choice.open_branches:
            branch.token_ids.append(token_id)
            fork.choice.add(branch.stream, token_id, logprob)
            self._settle(branch.parent)

    def take_winner(self, sequence: Sequence) -> tuple[int, ...] | None:
        """Once the choice is made: the tokens that the sequence got. It decodes again then."""
        fork = self._forks[sequence]
        if fork.choice.open_branches:
            return None
        winner = fork.choice.winner()
        for branch in fork.branches:
            if branch.stream != winner:
                self._end(branch)
        tokens = fork.choice.tokens(winner)
        self._batch.become(sequence, fork.branches[winner])
        self._batch.move(sequence, SequenceState.DECODE)
        cost = sequence.cost
        cost.num_steps += max(len(fork.choice.tokens(branch.stream)) for branch in fork.branches) - 1
        cost.num_rows += fork.choice.num_rows
        # The first token came from a row of the sequence itself.
        cost.num_tokens += len(tokens) - 1
        del self._forks[sequence]
        return tokens

    def forget(self, sequence: Sequence) -> None:
        """It is dropped or was preempted, and its branches with it."""
        fork = self._forks.pop(sequence, None)
        for branch in fork.branches if fork is not None else ():
            self._end(branch)

    def _settle(self, sequence: Sequence) -> None:
        """A branch that needs no more tokens takes no more part in steps; it keeps its blocks until the choice."""
        fork = self._forks[sequence]
        for branch in fork.branches:
            if branch.state is SequenceState.DECODE and branch.stream not in fork.choice.open_branches:
                self._batch.move(branch, SequenceState.BRANCHED)

    def _end(self, branch: Sequence) -> None:
        if branch.row != NO_ROW:
            self._batch.leave(branch)
            branch.move_to(SequenceState.FINISHED)

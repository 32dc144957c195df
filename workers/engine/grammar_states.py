"""The grammar states of the sequences that run, kept up with their tokens. Used in the engine's thread."""

from collections.abc import Iterable

from workers.engine.grammar import GrammarCompiler, GrammarState
from workers.engine.sequence import NO_TOKEN, Sequence, SequenceState


class GrammarStates:
    """A state for each sequence with a grammar; one that is lost is made again from the sequence's tokens."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._states: dict[Sequence, GrammarState] = {}

    def of(self, sequence: Sequence) -> GrammarState | None:
        """Where it is with the tokens that it has; None without a grammar."""
        grammar = sequence.sampling.grammar
        if grammar is None:
            return None
        state = self._states.get(sequence)
        begin = sequence.num_prompt_tokens - sequence.num_delivered
        if state is None:
            # Compiled before the request came here; after that it is in the cache, most of the time.
            state = self._compiler.compile(grammar).start(
                max_new_tokens=sequence.max_tokens - begin, stop_token_ids=sequence.stop_token_ids
            )
            self._states[sequence] = state
        if begin + state.num_tokens < len(sequence.token_ids):
            generated = sequence.token_ids[begin + state.num_tokens :]
            num_taken = state.accept(generated)
            if num_taken < len(generated) and state.problem is None:
                state.problem = f"grammar: token {generated[num_taken]}, generated elsewhere, does not fit it"
        return state

    def take(self, sequence: Sequence, token_id: int) -> tuple[int, bool]:
        """The token that becomes of the sampled one, and whether the text ends with it."""
        state = self._states[sequence]
        if token_id == NO_TOKEN or state.problem is not None:
            return NO_TOKEN, False
        token_id = state.settle(token_id)
        if state.accept([token_id]) == 0:
            return NO_TOKEN, False
        return token_id, state.must_stop

    def problem_of(self, sequence: Sequence) -> str | None:
        """Why no token can follow any more."""
        state = self._states.get(sequence)
        return state.problem if state is not None else None

    def keep(self, sequences: Iterable[Sequence]) -> None:
        """Forget all others that are over, or wait."""
        if self._states:
            running = set(sequences)
            for sequence in [one for one in self._states if one not in running]:
                if sequence.state not in (SequenceState.PREFILL, SequenceState.DECODE):
                    del self._states[sequence]

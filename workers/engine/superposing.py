"""Superposed decoding in the engine: which drafts a sequence stands for, and its next mixed input. Pure.

Source: Superposed Decoding (arXiv 2405.18400); the drafts themselves are `decoding.superposed`.
"""

from workers.api import SuperposedDecoding
from workers.engine.decoding.ngram_table import NgramTable
from workers.engine.decoding.superposed import MAX_CONTEXT, SuperposedDrafts
from workers.engine.sequence import Sequence

#: Tokens of a prompt, from its end, whose n-grams are learned: about 12 us each, in one step.
MAX_LEARNED = 1024


class Superposing:
    """The superposed sequences of one engine."""

    def __init__(self) -> None:
        self._drafts: dict[Sequence, SuperposedDrafts] = {}

    def step(self, sequence: Sequence, candidates: tuple[tuple[int, float], ...]) -> SuperposedDrafts | None:
        """Lengthen its drafts; returned when they are finished, otherwise its `mix` is what it computes next.

        candidates: likeliest next tokens with their logprobs, likeliest first.
        """
        drafts = self._drafts.get(sequence)
        if drafts is None:
            drafts = self._drafts[sequence] = _begin(sequence)
        drafts.step(candidates)
        if drafts.is_finished:
            return drafts
        sequence.mix = drafts.mix()
        # Stands for all of them: the row's KV belongs to no single token.
        sequence.token_ids.append(sequence.mix[0][0])
        return None

    def forget(self, sequence: Sequence) -> None:
        """It is dropped, or begins anew."""
        self._drafts.pop(sequence, None)
        sequence.mix = None


def _begin(sequence: Sequence) -> SuperposedDrafts:
    decoding = sequence.sampling.decoding
    assert isinstance(decoding, SuperposedDecoding)
    prompt = sequence.token_ids[: sequence.num_prompt_tokens]
    ngrams = NgramTable(MAX_CONTEXT, MAX_CONTEXT * MAX_LEARNED)
    ngrams.learn(prompt[-MAX_LEARNED:])
    return SuperposedDrafts(
        decoding.num_drafts,
        prompt,
        ngrams,
        stop_token_ids=sequence.stop_token_ids,
        max_tokens=sequence.sampling.max_new_tokens,
    )

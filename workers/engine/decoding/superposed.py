"""Superposed decoding: k short drafts from one row of the model a step. Pure.

The row's input is a mix of the embeddings of the drafts' last tokens. Its one distribution serves all drafts; n-grams
tell which of its tokens goes with which draft.
Source: Superposed Decoding (arXiv 2405.18400) and its code; the constants are those of its 15-token prefixes.
"""

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import starmap

from workers.engine.decoding.ngram_table import NgramTable

#: Weights of the distributions after 1, 2, 3, 4 and 5 tokens.
NGRAM_WEIGHTS = (0.01, 0.04, 0.15, 0.18, 0.12)
#: Contexts that the table of n-grams needs.
MAX_CONTEXT = len(NGRAM_WEIGHTS)
#: Taken from the score of a draft whose n-grams know none of the tokens, and twice from that of a token that
#: they rule out, which is then used only where nothing else is left.
PENALTY = 200.0


@dataclass(frozen=True, slots=True)
class MixSettings:
    """ngram_share: exponent of the n-grams, 0 to 1, the model's being the rest. temperature: of the model, > 0."""

    ngram_share: float
    temperature: float
    num_candidates: int


def mix_settings(num_drafts: int) -> MixSettings:
    """The constants for k drafts: those of the code for 1, 2, 3 and 10, between and beyond by rule."""
    if num_drafts == 1:
        # Nothing to tell apart: the draft is what greedy decoding gives.
        return MixSettings(0.0, 1.0, 1)
    share = 0.62 if num_drafts == 2 else 0.54
    # 0.06 up to 6 drafts, 0.12 from 10 on.
    temperature = 0.06 * min(max((num_drafts - 2) / 4, 1.0), 2.0)
    return MixSettings(share, temperature, 3 * num_drafts)


@dataclass(frozen=True, slots=True)
class _Draft:
    """score decides which drafts stay; logprob is the sum of the model's own, in nats."""

    token_ids: tuple[int, ...]
    score: float
    logprob: float


class SuperposedDrafts:
    """The drafts of one request, from its prompt to its last step.

    ngrams: made with MAX_CONTEXT, has learned whatever text there is; only read. prompt: token ids, at least one.
    max_tokens: of each draft; about 10 are useful. stop_token_ids end a draft and stay its last token.
    """

    def __init__(
        self,
        num_drafts: int,
        prompt: SequenceOf[int],
        ngrams: NgramTable,
        *,
        stop_token_ids: frozenset[int],
        max_tokens: int,
    ) -> None:
        assert max_tokens >= 1
        self._num_drafts = num_drafts
        self._settings = mix_settings(num_drafts)
        self._prompt_end = tuple(prompt[-MAX_CONTEXT:])
        self._ngrams = ngrams
        self._stop_token_ids = stop_token_ids
        self._max_tokens = max_tokens
        self._open = [_Draft((), 0.0, 0.0)]
        self._ended: list[_Draft] = []

    @property
    def num_candidates(self) -> int:
        """Likeliest tokens of the row that `step` wants to see."""
        return self._settings.num_candidates

    @property
    def is_finished(self) -> bool:
        """No further step can change the drafts."""
        if not self._open or len(self._open[0].token_ids) >= self._max_tokens:
            return True
        # Scores only fall.
        is_full = len(self._ended) >= self._num_drafts
        return is_full and self._ended[self._num_drafts - 1].score >= self._open[0].score

    def step(self, candidates: SequenceOf[tuple[int, float]]) -> None:
        """Lengthen all open drafts by one token.

        candidates: (token id, logprob under the model), likeliest first, of the prompt's last row at first and then
        of the mixed row; distinct. Those of -inf are ruled out; at least one is not.
        """
        assert not self.is_finished
        usable = [(token_id, logprob) for token_id, logprob in candidates if logprob > -math.inf]
        usable = usable[: self.num_candidates]
        assert usable
        tempered = _tempered([logprob for _, logprob in usable], self._settings.temperature)
        # (score, draft, token, its logprob). Most are not kept, so their tokens are not put together yet.
        grown = [
            (draft.score + score, draft, token_id, logprob)
            for draft in self._open
            for (token_id, logprob), score in zip(usable, self._scores(draft, usable, tempered), strict=True)
        ]
        # Stable: of equals, the better draft and the likelier token first.
        grown.sort(key=lambda one: -one[0])
        going_on = [one for one in grown if one[2] not in self._stop_token_ids][: self._num_drafts]
        ending = [one for one in grown[: 2 * self._num_drafts] if one[2] in self._stop_token_ids]
        self._open = list(starmap(_grown, going_on))
        self._ended += starmap(_grown, ending)
        self._ended.sort(key=lambda draft: -draft.score)
        del self._ended[self._num_drafts :]

    def mix(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Token ids and weights of the next row's input, weights > 0 or 0 and summing to 1. A token comes once."""
        best = self._open[0].score
        weights: dict[int, float] = {}
        for draft in self._open:
            token_id = draft.token_ids[-1]
            weights[token_id] = weights.get(token_id, 0.0) + math.exp(draft.score - best)
        total = sum(weights.values())
        return tuple(weights), tuple(weight / total for weight in weights.values())

    def drafts(self) -> tuple[tuple[tuple[int, ...], ...], tuple[float, ...]]:
        """The best drafts, at most k and all distinct, by falling logprob; and those logprobs."""
        best = sorted([*self._ended, *self._open], key=lambda draft: -draft.score)[: self._num_drafts]
        best.sort(key=lambda draft: -draft.logprob)
        return tuple(draft.token_ids for draft in best), tuple(draft.logprob for draft in best)

    def _scores(
        self, draft: _Draft, candidates: SequenceOf[tuple[int, float]], tempered: SequenceOf[float]
    ) -> list[float]:
        """What each candidate adds to the draft's score: log(p_model ** (1 - a) * p_ngram ** a), always finite."""
        share = self._settings.ngram_share
        if share == 0:
            return list(tempered)
        chances = self._ngram_chances(draft, [token_id for token_id, _ in candidates])
        unknown = -PENALTY if not any(chances) else -2 * PENALTY
        return [
            (1 - share) * logprob + (share * math.log(chance) if chance > 0 else unknown)
            for logprob, chance in zip(tempered, chances, strict=True)
        ]

    def _ngram_chances(self, draft: _Draft, token_ids: SequenceOf[int]) -> list[float]:
        context = (*self._prompt_end, *draft.token_ids[-MAX_CONTEXT:])[-MAX_CONTEXT:]
        chances = [0.0] * len(token_ids)
        for length, weight in enumerate(NGRAM_WEIGHTS[: len(context)], start=1):
            counts = self._ngrams.successors(context[len(context) - length :])
            if not counts:
                continue
            share = weight / sum(counts.values())
            for i, token_id in enumerate(token_ids):
                chances[i] += share * counts.get(token_id, 0)
        return chances


def _grown(score: float, draft: _Draft, token_id: int, logprob: float) -> _Draft:
    return _Draft((*draft.token_ids, token_id), score, draft.logprob + logprob)


def _tempered(logprobs: SequenceOf[float], temperature: float) -> list[float]:
    """The distribution over these tokens alone at a temperature, as logprobs; no overflow, no -inf."""
    highest = max(logprobs)
    scaled = [(logprob - highest) / temperature for logprob in logprobs]
    total = math.log(sum(math.exp(value) for value in scaled))
    return [value - total for value in scaled]

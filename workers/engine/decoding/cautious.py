"""Cautious decoding (CNTP): where the model is unsure, several continuations, of which the likeliest stays. Pure.

Source: CNTP (arXiv 2507.03038).
"""

import math
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from workers.api import CautiousDecoding

#: A continuation ends with one of these.
STOP_CHARACTERS = frozenset(".,\n?!:;)]}")
#: Punctuation does not end a shorter continuation. The perplexity is a mean, and a lone "," is often very
#: likely, so continuations of one token would win over every real one.
MIN_BRANCH_TOKENS = 2


def num_branches(entropy: float, params: CautiousDecoding) -> int:
    """Continuations to try at a token of this entropy, 1 to max_branches; 1 is plain sampling.

    entropy: of the warped distribution, in nats. 1 up to a whole step above min_entropy, max_branches from
    max_entropy on.
    Source: the authors' code; the paper's formula branches later (with its constants from 0.308 nats, not 0.176).
    """
    share = (entropy - params.min_entropy) / (params.max_entropy - params.min_entropy)
    return int(1 + (params.max_branches - 1) * min(max(share, 0.0), 1.0))


def punctuation_token_ids(token_texts: Iterable[str]) -> frozenset[int]:
    """Ids of the tokens that are punctuation and nothing else but spaces, such as ".", " .", ")," or a blank line.

    token_texts: what each token id decodes to, in the order of the ids.
    """
    return frozenset(
        token_id
        for token_id, text in enumerate(token_texts)
        if (marks := text.replace(" ", "").replace("\t", "")) and STOP_CHARACTERS.issuperset(marks)
    )


class BranchSet:
    """The continuations from one uncertain token on, until one of them is chosen.

    starts: first token of each branch and its logprob under the warped distribution, all drawn from one row, each
    with a random stream of its own that the branch keeps. Tokens may repeat: the branches part later.
    max_tokens: what the sequence may still get, >= 1.
    A branch ends with a stop token, with punctuation, after max_branch_tokens, or when the sequence is full. It is
    given up as soon as it can no longer win; that changes no result, only what is computed.
    """

    def __init__(
        self,
        params: CautiousDecoding,
        starts: SequenceOf[tuple[int, float]],
        *,
        punctuation: frozenset[int],
        stop_token_ids: frozenset[int],
        max_tokens: int,
    ) -> None:
        assert starts
        assert max_tokens >= 1
        self._punctuation = punctuation
        self._stop_token_ids = stop_token_ids
        self._max_tokens = min(params.max_branch_tokens, max_tokens)
        self._tokens: list[list[int]] = [[] for _ in starts]
        #: Sum of -log p of each branch, in nats.
        self._surprise = [0.0] * len(starts)
        self._open = set(range(len(starts)))
        #: (mean of -log p, branch) of the best that has ended.
        self._best = (math.inf, -1)
        for branch, (token_id, logprob) in enumerate(starts):
            self._append(branch, token_id, logprob)
        self._give_up_hopeless()

    @property
    def open_branches(self) -> tuple[int, ...]:
        """Branches that need another token, ascending; none left once `winner` is known."""
        return tuple(sorted(self._open))

    @property
    def num_rows(self) -> int:
        """Rows of the model that this took so far, the one that all first tokens came from left out."""
        return self.num_sampled_tokens - len(self._tokens)

    @property
    def num_sampled_tokens(self) -> int:
        """Tokens drawn so far; those of the winner are kept."""
        return sum(len(tokens) for tokens in self._tokens)

    def tokens(self, branch: int) -> tuple[int, ...]:
        """The tokens of a branch so far; the last one has no KV yet."""
        return tuple(self._tokens[branch])

    def add(self, branch: int, token_id: int, logprob: float) -> None:
        """The next token of an open branch. logprob: finite, under the warped distribution it was drawn from."""
        self._append(branch, token_id, logprob)
        self._give_up_hopeless()

    def perplexity(self, branch: int) -> float:
        """exp(-mean log p) of the branch's tokens so far."""
        return math.exp(self._surprise[branch] / len(self._tokens[branch]))

    def winner(self) -> int:
        """The branch of the lowest perplexity, the first of equals. Only when no branch is open."""
        assert not self._open
        return self._best[1]

    def _append(self, branch: int, token_id: int, logprob: float) -> None:
        assert branch in self._open
        assert math.isfinite(logprob)
        tokens = self._tokens[branch]
        tokens.append(token_id)
        self._surprise[branch] -= logprob
        is_span = token_id in self._punctuation and len(tokens) >= MIN_BRANCH_TOKENS
        if is_span or token_id in self._stop_token_ids or len(tokens) >= self._max_tokens:
            self._open.remove(branch)
            self._best = min(self._best, (self._surprise[branch] / len(tokens), branch))

    def _give_up_hopeless(self) -> None:
        """Drop branches that lose even if all their tokens to come were certain."""
        best = self._best[0]
        self._open = {branch for branch in self._open if self._surprise[branch] / self._max_tokens <= best}

"""What the model itself thinks of a token: its logprob, its rank, and the likeliest tokens beside it."""

from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from numpy.typing import NDArray

from workers.api import TokenLogprobs
from workers.engine.sampling.order import most_likely
from workers.engine.sampling.softmax import softmax_weights

#: Rows that are computed together: their float64 copy stays near 6 MB for a vocabulary of 49152.
CHUNK_ROWS = 16


def token_logprobs(
    logits: torch.Tensor, token_ids: SequenceOf[int], num_top: SequenceOf[int]
) -> list[TokenLogprobs]:
    """For each row, of its token and of its `num_top` likeliest tokens.

    logits: [rows, vocab_size] float32, as the model gave them. Computed in float64: exact for these
    logits to 1e-12. Equal logits rank by their ids, lowest first, so that `top[rank - 1]` is the token
    itself where it is long enough.
    """
    found: list[TokenLogprobs] = []
    for start in range(0, len(token_ids), CHUNK_ROWS):
        end = start + CHUNK_ROWS
        found += _chunk(logits[start:end], token_ids[start:end], num_top[start:end])
    return found


def _chunk(logits: torch.Tensor, token_ids: SequenceOf[int], num_top: SequenceOf[int]) -> list[TokenLogprobs]:
    values, tokens = logits.numpy(), np.array(token_ids)
    likeliest = most_likely(logits, max(1, *num_top))
    top_ids, top_values = likeliest.token_ids.numpy(), likeliest.values.numpy()
    highest = top_values[:, :1]
    _, total = softmax_weights(values, highest)
    # What all logprobs of a row are less than their logits.
    less = highest + np.log(total)
    own: list[float] = (values[np.arange(len(tokens)), tokens] - less[:, 0]).tolist()
    tops = [
        tuple(zip(ids[:num], logprobs, strict=False))
        for num, ids, logprobs in zip(num_top, top_ids.tolist(), (top_values - less).tolist(), strict=True)
    ]
    if top_values.min() == -np.inf:
        # Where fewer tokens than asked for are possible, the rest of the order is no token.
        tops = [tuple(pair for pair in top if pair[1] > -np.inf) for top in tops]
    ranks = _ranks(values, tokens, top_ids, top_values)
    return [TokenLogprobs(*row) for row in zip(token_ids, own, ranks, tops, strict=True)]


def _ranks(
    values: NDArray[np.float32],
    tokens: NDArray[np.int64],
    top_ids: NDArray[np.int64],
    top_values: NDArray[np.float32],
) -> list[int]:
    """Place of each row's token in the order from most to least likely, 1 for the first."""
    is_own = (top_ids == tokens[:, None]) & (top_values > -np.inf)
    ranks = is_own.argmax(axis=-1) + 1
    # Most tokens are among the likeliest; only for the others is the vocabulary counted.
    others = np.flatnonzero(~is_own.any(axis=-1))
    if len(others):
        chosen, ids = values[others], tokens[others]
        own = chosen[np.arange(len(others)), ids][:, None]
        ranks[others] = np.count_nonzero(chosen > own, axis=-1) + 1
        is_before = np.arange(values.shape[-1]) < ids[:, None]
        ranks[others] += np.count_nonzero((chosen == own) & is_before, axis=-1)
    found: list[int] = ranks.tolist()
    return found

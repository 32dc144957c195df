"""Draws from the warped distribution: temperature, then top_k, top_p of what is left, then min_p.

All three keep the likeliest tokens and cut the rest, so a row's distribution is the first tokens of its
order. Only the likeliest are looked at first; a row whose draw could end behind them is drawn again among more
of them, at last among all, so what is drawn never depends on how many are looked at.

The arrays are small but for the logits, so numpy does what is not per logit: its calls cost a third of torch's.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from workers.api import CautiousDecoding
from workers.engine.sampling.order import Ordered, most_likely
from workers.engine.sampling.philox import uniforms
from workers.engine.sampling.rows import SampleRow
from workers.engine.sampling.softmax import softmax_weights

#: Tokens that are looked at first, then next. Most draws end among them, and to sort a vocabulary is dear.
NUM_CANDIDATES = (256, 4096)
#: Rows that are drawn together: their float64 copies stay near 6 MB each for a vocabulary of 49152.
CHUNK_ROWS = 16


@dataclass(frozen=True, slots=True)
class Drawn:
    """What each row drew, one column for each stream.

    token_ids: [rows, streams]. shares: [rows, streams], their probability in the warped distribution.
    entropies: [rows], of that distribution in nats; 0 for rows that do not branch.
    """

    token_ids: NDArray[np.int64]
    shares: NDArray[np.float64]
    entropies: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Warp:
    """The options of each row: [rows, 1]. top_k is inf where it cuts nothing off."""

    temperature: NDArray[np.float64]
    top_k: NDArray[np.float64]
    top_p: NDArray[np.float64]
    min_p: NDArray[np.float64]
    is_branching: NDArray[np.bool_]

    def take(self, rows: NDArray[np.int64]) -> "_Warp":
        return _Warp(
            self.temperature[rows],
            self.top_k[rows],
            self.top_p[rows],
            self.min_p[rows],
            self.is_branching[rows],
        )


def draw(logits: torch.Tensor, rows: SequenceOf[SampleRow]) -> Drawn:
    """Inverse of the cumulative distribution, in float64, over tokens from most to least likely.

    logits: [len(rows), vocab_size] float32, in each row at least one above -inf, no NaN and no +inf.
    rows: at least one; all have a temperature above 0. Streams: one, or max_branches when a row branches.
    """
    num_streams = max(_num_streams(row) for row in rows)
    parts = [
        _draw_chunk(logits[start : start + CHUNK_ROWS], rows[start : start + CHUNK_ROWS], num_streams)
        for start in range(0, len(rows), CHUNK_ROWS)
    ]
    return Drawn(
        np.concatenate([part.token_ids for part in parts]),
        np.concatenate([part.shares for part in parts]),
        np.concatenate([part.entropies for part in parts]),
    )


def _num_streams(row: SampleRow) -> int:
    if not row.is_branching:
        return 1
    decoding = row.sampling.decoding
    assert isinstance(decoding, CautiousDecoding), "only cautious decoding branches"
    return decoding.max_branches


def _draw_chunk(logits: torch.Tensor, rows: SequenceOf[SampleRow], num_streams: int) -> Drawn:
    vocab_size = logits.shape[-1]
    warp, chance = _warp(rows, vocab_size), _chance(rows, num_streams)
    drawn, is_certain = _pick(logits, most_likely(logits, NUM_CANDIDATES[0]), warp, chance)
    for num_candidates in (*NUM_CANDIDATES[1:], vocab_size):
        unsure = np.flatnonzero(~is_certain)
        if not len(unsure):
            break
        of = logits[torch.from_numpy(unsure)]
        again, is_certain[unsure] = _pick(
            of, most_likely(of, num_candidates), warp.take(unsure), chance[unsure]
        )
        drawn.token_ids[unsure] = again.token_ids
        drawn.shares[unsure] = again.shares
        drawn.entropies[unsure] = again.entropies
    return drawn


def _warp(rows: SequenceOf[SampleRow], vocab_size: int) -> _Warp:
    options = np.array(
        [
            (one.temperature, one.top_k if 0 < one.top_k < vocab_size else np.inf, one.top_p, one.min_p)
            for one in (row.sampling for row in rows)
        ],
        dtype=np.float64,
    )
    temperature, top_k, top_p, min_p = (options[:, i : i + 1] for i in range(4))
    return _Warp(temperature, top_k, top_p, min_p, np.array([[row.is_branching] for row in rows]))


def _chance(rows: SequenceOf[SampleRow], num_streams: int) -> NDArray[np.float64]:
    """A random number for each row and stream; a row that does not branch has its one in every column."""
    numbers = iter(
        uniforms(
            [
                (row.sampling.seed, row.position, stream)
                for row in rows
                for stream in (range(num_streams) if row.is_branching else (row.stream,))
            ]
        )
    )
    if num_streams == 1:
        return np.array(list(numbers)).reshape(-1, 1)
    return np.array(
        [
            [next(numbers) for _ in range(num_streams)] if row.is_branching else [next(numbers)] * num_streams
            for row in rows
        ]
    )


def _probabilities(logits: torch.Tensor, ordered: Ordered, warp: _Warp) -> NDArray[np.float64]:
    """Probabilities of the ordered tokens: [rows, n].

    Those of a row whose top_k is within n < vocab_size are relative to the n tokens, as the rest does not
    matter there; the others' are relative to all tokens, summed in the order of ids. Which of both is the
    row's own affair, so no bit depends on the other rows.
    """
    values, token_ids, num_tokens = (
        ordered.values.numpy(),
        ordered.token_ids.numpy(),
        ordered.values.shape[-1],
    )
    is_relative = (warp.top_k <= num_tokens)[:, 0] & (num_tokens < logits.shape[-1])
    shares = np.empty(values.shape)
    for chosen, is_all in ((is_relative, False), (~is_relative, True)):
        if not chosen.any():
            continue
        rows = slice(None) if chosen.all() else chosen
        of = logits.numpy() if is_all else values
        weights, total = softmax_weights(of[rows], values[rows, :1], warp.temperature[rows])
        if is_all:
            weights = np.take_along_axis(weights, token_ids[rows], -1)
            weights[values[rows] == -np.inf] = 0.0
        shares[rows] = weights / total
    return shares


def _pick(
    logits: torch.Tensor, ordered: Ordered, warp: _Warp, chance: NDArray[np.float64]
) -> tuple[Drawn, NDArray[np.bool_]]:
    """What is drawn, and for each row whether it is the same with all other tokens behind these."""
    shares = _probabilities(logits, ordered, warp)
    num_tokens = shares.shape[-1]
    cumulative = shares.cumsum(axis=-1)
    is_complete = ordered.values.numpy()[:, -1:] == -np.inf
    is_complete |= num_tokens == logits.shape[-1]
    # What top_p is a part of: the probability of the tokens that top_k keeps.
    has_top_k, top_k = warp.top_k < np.inf, np.minimum(warp.top_k, num_tokens).astype(np.int64)
    mass = np.where(has_top_k, np.take_along_axis(cumulative, top_k - 1, -1), 1.0)
    is_mass_known = is_complete | ~has_top_k | (warp.top_k <= num_tokens)
    # The first token that reaches top_p is still kept.
    num_in_p = (cumulative < warp.top_p * mass).sum(axis=-1, keepdims=True) + 1
    num_in_min_p = (shares >= warp.min_p * shares[:, :1]).sum(axis=-1, keepdims=True)
    num_kept = np.minimum(warp.top_k, np.where(warp.top_p < 1, num_in_p, np.inf))
    # Where min_p keeps all of these, it may keep more.
    num_kept = np.minimum(num_kept, np.where(num_in_min_p < num_tokens, num_in_min_p, np.inf))
    is_bounded = is_complete | (num_kept <= num_tokens)
    is_free = ~has_top_k & (warp.top_p >= 1) & (warp.min_p <= 0)
    # Rounding must not lead to a token of probability 0.
    num_possible = np.count_nonzero(shares, axis=-1, keepdims=True)
    last = np.minimum(num_kept, num_possible).astype(np.int64) - 1
    kept_mass = np.take_along_axis(cumulative, last, -1)
    # With no option all tokens are kept, and their sum is 1 but for rounding.
    known_mass = np.where(is_free, 1.0, kept_mass)
    target = chance * known_mass
    picked = np.stack(
        [np.count_nonzero(cumulative <= target[:, j : j + 1], axis=-1) for j in range(target.shape[-1])],
        axis=-1,
    )
    picked = np.minimum(picked, last)
    is_known = is_free | (is_bounded & ((warp.top_p >= 1) | is_mass_known))
    is_certain = is_known & (target < cumulative[:, -1:]).all(axis=-1, keepdims=True)
    # The entropy needs all tokens that are kept.
    is_certain &= ~warp.is_branching | is_bounded
    drawn = Drawn(
        np.take_along_axis(ordered.token_ids.numpy(), picked, -1),
        np.take_along_axis(shares, picked, -1) / known_mass,
        _entropies(shares / kept_mass, last, warp.is_branching[:, 0]),
    )
    return drawn, (is_complete | is_certain)[:, 0]


def _entropies(
    shares: NDArray[np.float64], last: NDArray[np.int64], is_chosen: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Of the first `last` + 1 tokens of the chosen rows, in nats; 0 for the others: [rows]."""
    entropies = np.zeros(len(shares))
    if is_chosen.any():
        is_kept = (np.arange(shares.shape[-1]) <= last[is_chosen]) & (shares[is_chosen] > 0)
        kept = np.where(is_kept, shares[is_chosen], 1.0)
        entropies[is_chosen] = -(kept * np.log(kept)).cumsum(axis=-1)[:, -1]
    return entropies

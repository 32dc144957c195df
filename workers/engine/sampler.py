"""Chooses the next token of each sequence from its logits, and scores the tokens of prompts."""

import math
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch

from workers.api import CautiousDecoding, TokenLogprobs
from workers.engine.decoding.cautious import num_branches
from workers.engine.sampling.adjust import adjust
from workers.engine.sampling.draw import Drawn, draw
from workers.engine.sampling.logprobs import token_logprobs
from workers.engine.sampling.order import largest
from workers.engine.sampling.philox import uniform
from workers.engine.sampling.rows import SampleResult, SampleRow
from workers.engine.sequence import NO_TOKEN

__all__ = ["SampleResult", "SampleRow", "sample", "score_prompt", "uniform"]


def sample(
    logits: torch.Tensor,
    rows: SequenceOf[SampleRow],
    rule_out: Callable[[torch.Tensor], None] | None = None,
) -> SampleResult:
    """The next token of each row, and what else the rows ask for.

    logits: [len(rows), vocab_size] float32 on the CPU, contiguous, -inf for what is ruled out; may be
    overwritten. rule_out: sets further logits to -inf in place, as a grammar does.

    Logprobs are taken first. Then, in this order: rule_out, min_new_tokens, logit_bias, repetition penalty,
    presence and frequency penalty, temperature, top_k, top_p (of what top_k leaves), min_p, the draw.
    temperature 0 takes the largest logit after the penalties, the lowest id among equals; the options from
    top_k on cannot change it. NO_TOKEN for a row with a NaN, with +inf, or with nothing but -inf.
    A row's result does not depend on the other rows, to the last bit.
    """
    reported = [i for i, row in enumerate(rows) if row.sampling.num_logprobs is not None]
    given = _copy_of(logits, reported) if reported else None
    if rule_out is not None:
        rule_out(logits)
    adjust(logits, rows)
    highest, tokens = largest(logits)
    usable: list[bool] = np.isfinite(highest).tolist()
    stochastic = [i for i, row in enumerate(rows) if usable[i] and row.sampling.temperature > 0]
    drawn: Drawn | None = None
    if stochastic:
        is_all = len(stochastic) == len(rows)
        drawn = draw(logits if is_all else logits[stochastic], [rows[i] for i in stochastic])
        tokens[stochastic] = drawn.token_ids[:, 0]
    chosen: list[int] = tokens.tolist()
    result = SampleResult(
        [token if is_usable else NO_TOKEN for token, is_usable in zip(chosen, usable, strict=True)]
    )
    if given is not None:
        _report_logprobs(result, given, reported, rows)
    _report_warped(result, drawn, stochastic, rows)
    return result


def score_prompt(logits: torch.Tensor, next_token_ids: SequenceOf[int], num_top: int) -> list[TokenLogprobs]:
    """Logprob of the token that follows each position, and the num_top likeliest ones there.

    logits: [len(next_token_ids), vocab_size] float32; not changed.
    """
    return token_logprobs(logits, next_token_ids, [num_top] * len(next_token_ids))


def _copy_of(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return logits.clone() if len(rows) == len(logits) else logits[rows]


def _report_logprobs(
    result: SampleResult, given: torch.Tensor, reported: list[int], rows: SequenceOf[SampleRow]
) -> None:
    wanted = [j for j, i in enumerate(reported) if result.token_ids[i] != NO_TOKEN]
    indices = [reported[j] for j in wanted]
    found = token_logprobs(
        given if len(wanted) == len(reported) else given[wanted],
        [result.token_ids[i] for i in indices],
        [rows[i].sampling.num_logprobs or 0 for i in indices],
    )
    result.logprobs.update(zip(indices, found, strict=True))


def _report_warped(
    result: SampleResult, drawn: Drawn | None, stochastic: list[int], rows: SequenceOf[SampleRow]
) -> None:
    place = {i: j for j, i in enumerate(stochastic)}
    for i, row in enumerate(rows):
        if not (row.wants_warped_logprob or row.is_branching) or result.token_ids[i] == NO_TOKEN:
            continue
        # A greedy choice is certain.
        branches: tuple[tuple[int, float], ...] = ((result.token_ids[i], 0.0),)
        if drawn is not None and i in place:
            j = place[i]
            num = _num_branches(row, float(drawn.entropies[j])) if row.is_branching else 1
            logprobs = [math.log(share) for share in drawn.shares[j, :num].tolist()]
            branches = tuple(zip(drawn.token_ids[j, :num].tolist(), logprobs, strict=True))
        if row.wants_warped_logprob:
            result.warped_logprobs[i] = branches[0][1]
        if row.is_branching:
            result.branches[i] = branches


def _num_branches(row: SampleRow, entropy: float) -> int:
    decoding = row.sampling.decoding
    assert isinstance(decoding, CautiousDecoding), "only cautious decoding branches"
    return num_branches(entropy, decoding)

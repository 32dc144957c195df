"""Options that change single logits before they become a distribution: in place, all rows at once.

Every change is computed in float64 and rounded once to float32, so that a logit is the same in every batch.
What is added up of a sequence's tokens is taken from the tokens each time: after a hand-off, a preemption or
a failover there is nothing to restore.
"""

from collections.abc import Sequence as SequenceOf
from itertools import chain

import numpy as np
import torch

from workers.engine.sampling.rows import SampleRow

LARGEST = torch.finfo(torch.float32).max


def adjust(logits: torch.Tensor, rows: SequenceOf[SampleRow]) -> None:
    """min_new_tokens, logit_bias, repetition penalty, presence and frequency penalty, in this order.

    logits: [len(rows), vocab_size] float32, contiguous; changed in place. Only the tokens that an option
    names are touched, and -inf stays -inf.
    """
    _rule_out_stops(logits, rows)
    _add_biases(logits, rows)
    _penalise_repetition(logits, rows)
    _penalise_output(logits, rows)


def _rule_out_stops(logits: torch.Tensor, rows: SequenceOf[SampleRow]) -> None:
    """Stop tokens become -inf while fewer than min_new_tokens are generated."""
    vocab_size = logits.shape[-1]
    keys = [
        i * vocab_size + token
        for i, row in enumerate(rows)
        if row.sampling.min_new_tokens > _num_generated(row) - row.num_delivered
        for token in row.sampling.stop_token_ids
        if 0 <= token < vocab_size
    ]
    if keys:
        logits.view(-1)[torch.tensor(keys)] = -torch.inf


def _add_biases(logits: torch.Tensor, rows: SequenceOf[SampleRow]) -> None:
    """A token has one bias at most."""
    vocab_size = logits.shape[-1]
    biases = [
        (i * vocab_size + token, bias)
        for i, row in enumerate(rows)
        for token, bias in row.sampling.logit_bias
        if 0 <= token < vocab_size
    ]
    if not biases:
        return
    keys = torch.tensor([key for key, _ in biases])
    added = torch.tensor([bias for _, bias in biases], dtype=torch.float64)
    flat = logits.view(-1)
    flat[keys] = (flat[keys].double() + added).float()


def _penalise_repetition(logits: torch.Tensor, rows: SequenceOf[SampleRow]) -> None:
    """Logits of tokens of prompt and output: above 0 divided, below multiplied by the penalty, once.

    Source: CTRL (arXiv 1909.05858, section 4.1), in the form of transformers' RepetitionPenalty.
    """
    chosen = [i for i, row in enumerate(rows) if row.sampling.repetition_penalty != 1]
    if not chosen:
        return
    lengths = [len(rows[i].token_ids) for i in chosen]
    keys = _keys([rows[i].token_ids for i in chosen], chosen, lengths, logits.shape[-1])
    penalty = _repeated([rows[i].sampling.repetition_penalty for i in chosen], lengths)
    flat = logits.view(-1)
    before = flat[keys].double()
    # A token that is there twice writes the same value twice.
    # A tiny penalty must not make an infinity of a logit, or the row would be unusable.
    divided = (before / penalty).clamp(max=LARGEST)
    flat[keys] = torch.where(before < 0, before * penalty, divided).float()


def _penalise_output(logits: torch.Tensor, rows: SequenceOf[SampleRow]) -> None:
    """From logits of tokens of the output: presence_penalty once, frequency_penalty for each time.

    Source: OpenAI's API reference, "frequency and presence penalties".
    """
    chosen = [
        i
        for i, row in enumerate(rows)
        if (row.sampling.presence_penalty or row.sampling.frequency_penalty) and _num_generated(row) > 0
    ]
    if not chosen:
        return
    vocab_size = logits.shape[-1]
    lengths = [_num_generated(rows[i]) for i in chosen]
    outputs = [rows[i].token_ids[rows[i].num_prompt_tokens :] for i in chosen]
    keys, counts = torch.unique(_keys(outputs, chosen, lengths, vocab_size), return_counts=True)
    penalties = torch.zeros(len(rows), 2, dtype=torch.float64)
    penalties[chosen] = torch.tensor(
        [[rows[i].sampling.presence_penalty, rows[i].sampling.frequency_penalty] for i in chosen],
        dtype=torch.float64,
    )
    presence, frequency = penalties[keys // vocab_size].unbind(-1)
    flat = logits.view(-1)
    flat[keys] = (flat[keys].double() - (presence + frequency * counts)).float()


def _num_generated(row: SampleRow) -> int:
    return len(row.token_ids) - row.num_prompt_tokens


def _keys(
    tokens: SequenceOf[SequenceOf[int]], rows: SequenceOf[int], lengths: SequenceOf[int], vocab_size: int
) -> torch.Tensor:
    """Index in the flattened logits of each of these rows' tokens."""
    found = np.fromiter(chain.from_iterable(tokens), dtype=np.int64, count=sum(lengths))
    return torch.from_numpy(found + np.repeat(np.array(rows) * vocab_size, lengths))


def _repeated(values: SequenceOf[float], lengths: SequenceOf[int]) -> torch.Tensor:
    return torch.from_numpy(np.repeat(np.array(values, dtype=np.float64), lengths))

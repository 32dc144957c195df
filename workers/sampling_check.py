"""Do sampling options mean something, each and together? Pure.

The gateway asks before it takes a request and each worker before it runs one, so both say the same.
"""

import json
import math
from collections.abc import Iterator
from typing import NamedTuple

from workers.api import (
    MAX_BRANCH_TOKENS,
    MAX_BRANCHES,
    MAX_DRAFT_TOKENS,
    MAX_DRAFTS,
    MAX_GRAMMAR_CHARS,
    MAX_LOGIT_BIAS,
    MAX_LOGIT_BIASES,
    MAX_LOGPROBS,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_STOP_TOKEN_IDS,
    MAX_TEMPERATURE,
    CautiousDecoding,
    DecodingMethod,
    Grammar,
    GrammarKind,
    NgramDrafts,
    SamplingParams,
    SuperposedDecoding,
)

MAX_SHOWN_CHARS = 80


class Problem(NamedTuple):
    """What is wrong: the field as users write it, what it is, and what is allowed."""

    field: str
    value: str
    allowed: str


def sampling_problem(sampling: SamplingParams, vocab_size: int) -> Problem | None:
    """The first thing that is wrong; None when nothing is."""
    return next(_problems(sampling, vocab_size), None)


def _problems(sampling: SamplingParams, vocab_size: int) -> Iterator[Problem]:
    yield from _length_problems(sampling)
    yield from _shape_problems(sampling)
    yield from _penalty_problems(sampling, vocab_size)
    yield from _stop_problems(sampling, vocab_size)
    yield from _logprob_problems(sampling)
    if sampling.grammar is not None:
        yield from _grammar_problems(sampling.grammar)
        if sampling.min_new_tokens > 0:
            # Where the grammar ends there would be nothing left to draw.
            yield Problem("min_tokens", "set together with a grammar", "one of the two")
    if sampling.decoding is not None:
        yield from _decoding_problems(sampling.decoding)
        yield from _conflicts(sampling, sampling.decoding)


def _length_problems(sampling: SamplingParams) -> Iterator[Problem]:
    if sampling.max_new_tokens < 1:
        yield Problem("max_tokens", str(sampling.max_new_tokens), "1 or more")
    if not 0 <= sampling.min_new_tokens <= sampling.max_new_tokens:
        allowed = f"0 to {sampling.max_new_tokens}, which is max_tokens"
        yield Problem("min_tokens", str(sampling.min_new_tokens), allowed)


def _shape_problems(sampling: SamplingParams) -> Iterator[Problem]:
    # All ranges are written so that NaN is refused.
    if not 0 <= sampling.temperature <= MAX_TEMPERATURE:
        yield Problem("temperature", f"{sampling.temperature:g}", f"0 to {MAX_TEMPERATURE:g}")
    if sampling.top_k < 0:
        yield Problem("top_k", str(sampling.top_k), "1 or more, or 0 for all tokens")
    if not 0 < sampling.top_p <= 1:
        yield Problem("top_p", f"{sampling.top_p:g}", "above 0, up to 1")
    if not 0 <= sampling.min_p <= 1:
        yield Problem("min_p", f"{sampling.min_p:g}", "0 to 1")


def _penalty_problems(sampling: SamplingParams, vocab_size: int) -> Iterator[Problem]:
    if not 0 < sampling.repetition_penalty <= MAX_REPETITION_PENALTY:
        allowed = f"above 0, up to {MAX_REPETITION_PENALTY:g}"
        yield Problem("repetition_penalty", f"{sampling.repetition_penalty:g}", allowed)
    for field, penalty in (
        ("presence_penalty", sampling.presence_penalty),
        ("frequency_penalty", sampling.frequency_penalty),
    ):
        if not -MAX_PENALTY <= penalty <= MAX_PENALTY:
            yield Problem(field, f"{penalty:g}", f"{-MAX_PENALTY:g} to {MAX_PENALTY:g}")
    if len(sampling.logit_bias) > MAX_LOGIT_BIASES:
        yield Problem("logit_bias", f"of {len(sampling.logit_bias)} tokens", f"at most {MAX_LOGIT_BIASES}")
    seen = set()
    for token_id, bias in sampling.logit_bias:
        if not 0 <= token_id < vocab_size:
            yield Problem("logit_bias", f"for token {token_id}", f"tokens 0 to {vocab_size - 1}")
        if token_id in seen:
            yield Problem("logit_bias", f"given twice for token {token_id}", "each token once")
        if not -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS:
            allowed = f"{-MAX_LOGIT_BIAS:g} to {MAX_LOGIT_BIAS:g}"
            yield Problem(f"logit_bias[{token_id}]", f"{bias:g}", allowed)
        seen.add(token_id)


def _stop_problems(sampling: SamplingParams, vocab_size: int) -> Iterator[Problem]:
    token_ids = sampling.stop_token_ids
    if len(token_ids) > MAX_STOP_TOKEN_IDS:
        yield Problem("stop_token_ids", f"{len(token_ids)} ids", f"at most {MAX_STOP_TOKEN_IDS}")
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        wrong = next(token_id for token_id in sorted(token_ids) if not 0 <= token_id < vocab_size)
        yield Problem("stop_token_ids", f"{wrong} among others", f"tokens 0 to {vocab_size - 1}")


def _logprob_problems(sampling: SamplingParams) -> Iterator[Problem]:
    for field, number in (
        ("logprobs", sampling.num_logprobs),
        ("prompt_logprobs", sampling.num_prompt_logprobs),
    ):
        if number is not None and not 0 <= number <= MAX_LOGPROBS:
            yield Problem(field, str(number), f"0 to {MAX_LOGPROBS}")


def _grammar_problems(grammar: Grammar) -> Iterator[Problem]:
    field = grammar.kind.value
    if not grammar.text.strip():
        yield Problem(field, "empty", "a text")
    if len(grammar.text) > MAX_GRAMMAR_CHARS:
        yield Problem(field, f"{len(grammar.text)} characters long", f"at most {MAX_GRAMMAR_CHARS}")
    elif grammar.kind in (GrammarKind.JSON_SCHEMA, GrammarKind.CHOICE):
        yield from _json_problems(grammar)


def _json_problems(grammar: Grammar) -> Iterator[Problem]:
    field = grammar.kind.value
    try:
        value = json.loads(grammar.text)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        yield Problem(field, _shown(grammar.text), f"JSON: {why}")
        return
    if grammar.kind is GrammarKind.JSON_SCHEMA:
        if not isinstance(value, dict | bool):
            yield Problem(field, _shown(grammar.text), "a JSON object, true or false")
    elif not (isinstance(value, list) and value and all(isinstance(text, str) and text for text in value)):
        yield Problem(field, _shown(grammar.text), "one or more texts, none of them empty")


def _decoding_problems(decoding: DecodingMethod) -> Iterator[Problem]:
    match decoding:
        case NgramDrafts(max_draft_tokens):
            yield from _count("ngram_drafts.max_draft_tokens", max_draft_tokens, 1, MAX_DRAFT_TOKENS)
        case CautiousDecoding():
            yield from _count("cautious.max_branches", decoding.max_branches, 2, MAX_BRANCHES)
            yield from _count("cautious.max_branch_tokens", decoding.max_branch_tokens, 1, MAX_BRANCH_TOKENS)
            if not 0 <= decoding.min_entropy < math.inf:
                yield Problem("cautious.min_entropy", f"{decoding.min_entropy:g}", "0 nats or more")
            if not decoding.min_entropy < decoding.max_entropy < math.inf:
                allowed = f"above min_entropy, which is {decoding.min_entropy:g}"
                yield Problem("cautious.max_entropy", f"{decoding.max_entropy:g}", allowed)
        case SuperposedDecoding(num_drafts):
            yield from _count("superposed.num_drafts", num_drafts, 1, MAX_DRAFTS)


def _conflicts(sampling: SamplingParams, decoding: DecodingMethod) -> Iterator[Problem]:
    """Options that a decoding method cannot honour: they are refused, not forgotten."""
    penalties = {
        "repetition_penalty": sampling.repetition_penalty != 1,
        "presence_penalty": sampling.presence_penalty != 0,
        "frequency_penalty": sampling.frequency_penalty != 0,
    }
    grammar = {"" if sampling.grammar is None else sampling.grammar.kind.value: sampling.grammar is not None}
    logprobs = {"logprobs": sampling.num_logprobs is not None}
    match decoding:
        case NgramDrafts():
            name, refused = "ngram_drafts", grammar | logprobs | penalties
        case CautiousDecoding():
            name, refused = "cautious", grammar | logprobs
        case SuperposedDecoding():
            others = {
                "temperature": sampling.temperature != 0,
                "logit_bias": bool(sampling.logit_bias),
                "min_tokens": sampling.min_new_tokens > 0,
                "prompt_logprobs": sampling.num_prompt_logprobs is not None,
            }
            name, refused = "superposed", grammar | logprobs | penalties | others
    for field, is_set in refused.items():
        if is_set:
            yield Problem(field, f"set together with {name}", "one of the two")


def _count(field: str, value: int, lowest: int, highest: int) -> Iterator[Problem]:
    if not lowest <= value <= highest:
        yield Problem(field, str(value), f"{lowest} to {highest}")


def _shown(text: str) -> str:
    return repr(text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "...")

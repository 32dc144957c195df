"""The random requests of the soak, and what samples of memory say. Pure, but for the random numbers handed in."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

from workers.api import (
    CautiousDecoding,
    Grammar,
    GrammarKind,
    NgramDrafts,
    Phase,
    RequestKey,
    SamplingParams,
    Submit,
    SuperposedDecoding,
    WorkerStatus,
)

PHASES = frozenset({Phase.PREFILL, Phase.DECODE})
MAX_PROMPT_TOKENS, MAX_NEW_TOKENS = 600, 96
NUM_PREFIXES, PREFIX_TOKENS = 6, 200
SHARED_PART, ABORTED_PART, HURRIED_PART, CACHED_SALT_PART = 0.4, 0.15, 0.1, 0.2
LONG_TIMEOUT_S = 600.0
HURRIED_S = (0.05, 4.0)
#: Samples that the growth is taken from, at most: the time is quadratic in them.
MAX_GROWTH_SAMPLES = 400
GRAMMARS = (
    Grammar(GrammarKind.REGEX, "[a-z]{1,40}"),
    Grammar(GrammarKind.CHOICE, '["yes", "no", "perhaps"]'),
    Grammar(
        GrammarKind.JSON_SCHEMA,
        '{"type": "object", "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},'
        ' "required": ["name", "age"], "additionalProperties": false}',
    ),
)


@dataclass(frozen=True, slots=True)
class SoakRequest:
    """abort_after: it is aborted once it has so many tokens; None lets it end."""

    submit: Submit
    abort_after: int | None


@dataclass(frozen=True, slots=True)
class MemorySample:
    """At one moment: seconds since the load began, resident memory."""

    at_s: float
    num_bytes: int


class RandomRequests:
    """Requests of all kinds. The same generator and text give the same requests."""

    def __init__(self, rng: random.Random, text: Sequence[int]) -> None:
        """text: token ids, at least MAX_PROMPT_TOKENS of them."""
        self._rng = rng
        self._text = text
        self._prefixes = [self._piece(PREFIX_TOKENS) for _ in range(NUM_PREFIXES)]

    def next(self, key: RequestKey) -> SoakRequest:
        """The next one, under this key."""
        rng = self._rng
        num_prompt = min(MAX_PROMPT_TOKENS, max(1, round(rng.lognormvariate(4.5, 1.0))))
        prompt = self._piece(num_prompt)
        if rng.random() < SHARED_PART:
            prompt = (*rng.choice(self._prefixes), *prompt)[:MAX_PROMPT_TOKENS]
        sampling = self._sampling(min(MAX_NEW_TOKENS, max(1, round(rng.lognormvariate(3.2, 0.8)))))
        timeout_s = rng.uniform(*HURRIED_S) if rng.random() < HURRIED_PART else LONG_TIMEOUT_S
        submit = Submit(
            key,
            PHASES,
            prompt,
            sampling,
            timeout_s,
            priority=rng.choice((0, 0, 0, 1, -1)),
            cache_salt="tenant" if rng.random() < CACHED_SALT_PART else "",
        )
        is_aborted = rng.random() < ABORTED_PART
        return SoakRequest(submit, rng.randrange(sampling.max_new_tokens) if is_aborted else None)

    def _piece(self, num_tokens: int) -> tuple[int, ...]:
        start = self._rng.randrange(len(self._text) - num_tokens + 1)
        return tuple(self._text[start : start + num_tokens])

    def _sampling(self, num_tokens: int) -> SamplingParams:
        rng = self._rng
        temperature = rng.choice((0.0, 0.7, 1.0))
        match rng.randrange(8):
            case 0:
                return SamplingParams(num_tokens, temperature, decoding=NgramDrafts())
            case 1:
                return SamplingParams(num_tokens, temperature, decoding=CautiousDecoding(max_branches=3))
            case 2:
                return SamplingParams(min(num_tokens, 16), decoding=SuperposedDecoding())
            case 3:
                return SamplingParams(num_tokens, temperature, grammar=rng.choice(GRAMMARS))
            case 4:
                num_logprobs, num_prompt_logprobs = rng.choice((None, 0, 5)), rng.choice((None, 0, 2))
                return SamplingParams(
                    num_tokens,
                    temperature,
                    num_logprobs=num_logprobs,
                    num_prompt_logprobs=num_prompt_logprobs,
                )
            case 5:
                return SamplingParams(
                    num_tokens,
                    temperature,
                    repetition_penalty=1.2,
                    presence_penalty=0.5,
                    frequency_penalty=0.2,
                    logit_bias=((self._text[0], 2.0), (self._text[1], -5.0)),
                )
            case 6:
                return SamplingParams(
                    num_tokens,
                    temperature,
                    top_k=40,
                    top_p=0.9,
                    min_p=0.02,
                    seed=rng.randrange(2**64),
                )
            case _:
                return SamplingParams(num_tokens, stop_token_ids=frozenset({self._text[2]}))


def floors(samples: Sequence[MemorySample], period_s: float) -> list[MemorySample]:
    """The lowest sample of each period: the buffers of single steps come and go above it, a leak raises it.

    samples: in the order of time. A last period that is cut short is left out unless it is the only one.
    """
    lowest: dict[int, MemorySample] = {}
    for sample in samples:
        period = int(sample.at_s // period_s)
        if period not in lowest or sample.num_bytes < lowest[period].num_bytes:
            lowest[period] = sample
    whole = [one for period, one in lowest.items() if (period + 1) * period_s <= samples[-1].at_s + 1]
    return whole or list(lowest.values())


def growth_bytes_per_minute(samples: Sequence[MemorySample]) -> float:
    """How memory grows: the median over the slopes between any two samples, which single peaks do not move.

    0 for fewer than two samples.
    """
    step = -(-len(samples) // MAX_GROWTH_SAMPLES) or 1
    kept = samples[::step]
    slopes = [
        (later.num_bytes - earlier.num_bytes) / (later.at_s - earlier.at_s)
        for earlier, later in combinations(kept, 2)
        if later.at_s > earlier.at_s
    ]
    return median(slopes) * 60 if slopes else 0.0


def left_behind(status: WorkerStatus) -> list[str]:
    """What an idle worker should not have."""
    blocks = status.blocks
    counts = {
        "running requests": status.num_running,
        "waiting requests": status.num_waiting,
        "leases": status.num_leases,
        "blocks in use": blocks.in_use,
        "leased blocks": blocks.leased,
        "lost blocks": blocks.total - blocks.free - blocks.cached - blocks.in_use - blocks.leased,
    }
    return [f"{count} {what}" for what, count in counts.items() if count != 0]

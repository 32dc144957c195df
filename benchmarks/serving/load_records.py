"""What a closed loop of requests saw, and what that says of the engine behind it. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.control.slo import itl_s, percentile, tpot_s


@dataclass(frozen=True, slots=True)
class Record:
    """One request that got all its tokens. Times are of one clock, in seconds."""

    num_prompt_tokens: int
    began_s: float
    token_ids: tuple[int, ...]
    #: One for each token; those that came in one message have one time.
    token_times_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """Times in seconds; rates from the first request's begin to the last token."""

    num_requests: int
    output_tokens_per_s: float
    #: Prompts counted too.
    total_tokens_per_s: float
    ttft_p50_s: float
    ttft_max_s: float
    tpot_p50_s: float
    tpot_max_s: float
    #: The longest wait between two tokens of one request.
    worst_gap_s: float


def summarise(records: Sequence[Record]) -> LoadSummary:
    """records: at least one, each with at least two tokens."""
    begin_s = min(record.began_s for record in records)
    elapsed_s = max(record.token_times_s[-1] for record in records) - begin_s
    num_output = sum(len(record.token_ids) for record in records)
    num_prompt = sum(record.num_prompt_tokens for record in records)
    ttfts_s = sorted(record.token_times_s[0] - record.began_s for record in records)
    tpots_s = sorted(value for r in records if (value := tpot_s(r.token_times_s)) is not None)
    return LoadSummary(
        num_requests=len(records),
        output_tokens_per_s=num_output / elapsed_s,
        total_tokens_per_s=(num_output + num_prompt) / elapsed_s,
        ttft_p50_s=percentile(ttfts_s, 50),
        ttft_max_s=ttfts_s[-1],
        tpot_p50_s=percentile(tpots_s, 50),
        tpot_max_s=tpots_s[-1],
        worst_gap_s=max(gap_s for record in records for gap_s in itl_s(record.token_times_s)),
    )


def num_equal(tokens: Sequence[int], reference: Sequence[int]) -> int:
    """Tokens before the first difference."""
    for i, (token, expected) in enumerate(zip(tokens, reference, strict=False)):
        if token != expected:
            return i
    return min(len(tokens), len(reference))


def distinct_windows(
    token_ids: Sequence[int], *, num_tokens: int, num_windows: int, num_distinct: int
) -> list[list[int]]:
    """Pieces of a text, one after the other, no two of which begin with the same `num_distinct` tokens.

    Raises ValueError when the text is too short.
    """
    windows: list[list[int]] = []
    beginnings: set[tuple[int, ...]] = set()
    for start in range(0, len(token_ids) - num_tokens + 1, num_tokens):
        if len(windows) == num_windows:
            break
        beginning = tuple(token_ids[start : start + num_distinct])
        if beginning not in beginnings:
            beginnings.add(beginning)
            windows.append(list(token_ids[start : start + num_tokens]))
    if len(windows) < num_windows:
        raise ValueError(
            f"the text has {len(windows)} different pieces of {num_tokens} tokens, not {num_windows}; use a longer one"
        )
    return windows

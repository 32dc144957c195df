"""From rows of a trace to requests: which, when, how long, and with which tokens. Pure."""

import hashlib
from dataclasses import dataclass

import numpy as np

from orchestrator.bench.trace import HASH_BLOCK_TOKENS, Trace, TraceRow
from orchestrator.errors import TraceError


@dataclass(frozen=True, slots=True)
class Slice:
    """Consecutive rows of a trace, re-timed; `arrivals_s` count from 0, one for each row."""

    rows: tuple[TraceRow, ...]
    arrivals_s: tuple[float, ...]
    #: How many times faster than in the trace.
    speed_up: float


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request of the load, with the lengths it will have."""

    row: TraceRow
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    #: Whose tokens are in the prompt.
    num_images: int = 0

    @property
    def is_prompt_clipped(self) -> bool:
        """The prompt is shorter than in the trace."""
        return self.prompt_tokens < self.row.prompt_tokens

    @property
    def is_output_clipped(self) -> bool:
        """The output is shorter than in the trace."""
        return self.output_tokens < self.row.output_tokens


def take_slice(trace: Trace, *, rate_rps: float, duration_s: float, first_row: int = 1) -> Slice:
    """`rate_rps * duration_s` rows from `first_row` (counted from 1), spread over `duration_s`.

    All gaps are scaled by one factor, so bursts keep their shape. The span that becomes `duration_s`
    ends where the next row arrives; a slice that ends with the file gets its mean gap at the end.
    Raises TraceError when the trace has too few rows or they arrive all at once.
    """
    num_rows = round(min(rate_rps * duration_s, 1e12))
    if num_rows < 1:
        raise TraceError(
            trace.file, None, f"{rate_rps:g} requests/s for {duration_s:g} s is no request at all"
        )
    if first_row < 1:
        raise TraceError(trace.file, None, f"there is no row {first_row}: the first one is row 1")
    start = first_row - 1
    rows = trace.rows[start : start + num_rows]
    if len(rows) < num_rows:
        raise TraceError(
            trace.file,
            None,
            f"{rate_rps:g} requests/s for {duration_s:g} s needs {num_rows} rows from row {first_row} on; "
            f"the trace ends at row {len(trace.rows)}",
        )
    if num_rows == 1:
        return Slice(rows, (0.0,), 1.0)
    origin_s = rows[0].arrival_s
    if start + num_rows < len(trace.rows):
        span_s = trace.rows[start + num_rows].arrival_s - origin_s
    else:
        span_s = (rows[-1].arrival_s - origin_s) * num_rows / (num_rows - 1)
    if span_s <= 0:
        raise TraceError(
            trace.file,
            None,
            f"rows {first_row} to {start + num_rows} all arrive at once, so no rate can be made of them; "
            "take more rows with a longer duration, or begin at another row",
        )
    arrivals_s = tuple((row.arrival_s - origin_s) / span_s * duration_s for row in rows)
    return Slice(rows, arrivals_s, span_s / duration_s)


def plan_requests(
    part: Slice,
    *,
    max_context_tokens: int,
    max_prompt_tokens: int | None = None,
    max_output_tokens: int | None = None,
    image_tokens: int = 0,
) -> list[PlannedRequest]:
    """The requests of a slice, clipped to the given limits and to the context (>= 2 tokens).

    The output is clipped first, then the prompt to what is left of the context. image_tokens: of a prompt, that stand for one picture; a prompt
    that is too short for its pictures is made longer, and those that are too many for the context are left out. 0: all are.
    """
    planned = []
    for row, arrival_s in zip(part.rows, part.arrivals_s, strict=True):
        output_tokens = min(row.output_tokens, max_output_tokens or row.output_tokens, max_context_tokens - 1)
        room = max_context_tokens - output_tokens
        prompt_tokens = min(row.prompt_tokens, max_prompt_tokens or row.prompt_tokens, room)
        num_images = min(row.num_images, (room - 1) // image_tokens) if image_tokens else 0
        # One token at least is of text.
        prompt_tokens = max(prompt_tokens, num_images * image_tokens + 1)
        planned.append(PlannedRequest(row, arrival_s, prompt_tokens, output_tokens, num_images))
    return planned


def prompt_token_ids(row: TraceRow, num_tokens: int, *, vocab_size: int, seed: int) -> list[int]:
    """Tokens of a prompt, the same for the same arguments on every machine.

    With hash_ids, each stands for a block of 512 tokens; without, the row has a prompt of its own.
    """
    if not row.hash_ids:
        return _tokens(f"{seed}/row/{row.number}", num_tokens, vocab_size)
    num_blocks = -(-num_tokens // HASH_BLOCK_TOKENS)
    blocks = (
        _tokens(f"{seed}/block/{hash_id}", HASH_BLOCK_TOKENS, vocab_size)
        for hash_id in row.hash_ids[:num_blocks]
    )
    return [token for block in blocks for token in block][:num_tokens]


def _tokens(name: str, num_tokens: int, vocab_size: int) -> list[int]:
    digits = hashlib.shake_256(name.encode()).digest(4 * num_tokens)
    tokens: list[int] = (np.frombuffer(digits, dtype="<u4") % vocab_size).tolist()
    return tokens

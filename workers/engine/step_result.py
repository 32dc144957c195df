"""What a step yields, from the runner to the engine. Pure."""

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from workers.api import TokenLogprobs
from workers.engine.decoding.acceptance import Accepted


@dataclass(frozen=True, slots=True)
class RowDetail:
    """What is said of one slice beyond its token, because its request asked for more than that."""

    logprobs: TokenLogprobs | None = None
    #: Logprob of the token under the distribution that it was drawn from; of branches.
    warped_logprob: float = 0.0
    #: Tokens to branch into, each with its warped logprob; fewer than two mean no branching.
    branches: tuple[tuple[int, float], ...] = ()
    #: What verifying its drafts brought; the slice's token is the first of it.
    accepted: Accepted | None = None
    #: Rows that it took in the step.
    num_rows: int = 1
    #: Likeliest next tokens with their logprobs, of a superposed decoding.
    top: tuple[tuple[int, float], ...] = ()
    #: The grammar allows nothing after this token.
    is_complete: bool = False
    #: Why there is no token.
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class FilteredChunk:
    """places: tokens of the chunk that have left the prompt, ascending. layer_rows: rows that each layer computed."""

    places: tuple[int, ...]
    layer_rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepResult:
    """token_ids: one sampled token for each slice that yields one, in order; NO_TOKEN where none could be sampled."""

    token_ids: SequenceOf[int]
    #: By index in token_ids; most have none.
    details: Mapping[int, RowDetail] = field(default_factory=dict)
    #: By index in the plan's chunks: logprobs of the prompt's tokens after each of the chunk's.
    prompt_logprobs: Mapping[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    #: By index in the plan's chunks: of each that is filtered.
    filtered: Mapping[int, FilteredChunk] = field(default_factory=dict)
    #: Since the step before it ended on the device, in seconds by the device's clock; None where the host's says it.
    device_s: float | None = None

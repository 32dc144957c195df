"""What is asked of the sampler for each row of logits, and what it answers."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from workers.api import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class SampleRow:
    """How to sample one row.

    position: the index that the new token gets in its sequence.
    token_ids: all tokens before it, prompt and generated; read only when an option needs them.
    num_prompt_tokens: how many of them are the prompt; the rest counts as generated.
    num_delivered: how many of the generated ones an earlier attempt generated: min_new_tokens counts after those.
    stream: draws of different streams are independent of each other.
    is_branching: draw as many tokens as `sampling.decoding`, a CautiousDecoding, wants here. Its streams are
    0, 1, 2 and so on, whatever `stream` says.
    wants_warped_logprob: report the logprob of the token under the distribution that it was drawn from.
    """

    sampling: SamplingParams
    position: int
    token_ids: SequenceOf[int] = ()
    num_prompt_tokens: int = 0
    num_delivered: int = 0
    stream: int = 0
    is_branching: bool = False
    wants_warped_logprob: bool = False


@dataclass(frozen=True, slots=True)
class SampleResult:
    """Tokens by row, and by the row's index what only some rows ask for.

    token_ids: NO_TOKEN for a row whose logits are unusable; such a row is in none of the others.
    logprobs: of rows whose `num_logprobs` is not None; what the model gave before any option.
    warped_logprobs: in nats, after all options; 0.0 for a greedy row.
    branches: (token, warped logprob) of each token drawn; the first is the row's token. Tokens may repeat.
    """

    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    warped_logprobs: dict[int, float] = field(default_factory=dict)
    branches: dict[int, tuple[tuple[int, float], ...]] = field(default_factory=dict)


def is_plain(sampling: SamplingParams) -> bool:
    """The next token is chosen by logits, options of the draw, and the number of tokens before it alone."""
    return (
        sampling.grammar is None
        and sampling.decoding is None
        and sampling.num_logprobs is None
        and sampling.num_prompt_logprobs is None
        and sampling.repetition_penalty == 1
        and sampling.presence_penalty == 0
        and sampling.frequency_penalty == 0
        and not sampling.logit_bias
        and sampling.min_new_tokens == 0
    )

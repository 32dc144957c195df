"""How the tokens of a request are chosen, and the limits of what may be asked for."""

from dataclasses import dataclass
from enum import StrEnum

MAX_STOP_TOKEN_IDS = 64
MAX_TEMPERATURE = 100.0
MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 1024
MAX_LOGIT_BIAS = 100.0
MAX_PENALTY = 2.0
MAX_REPETITION_PENALTY = 10.0
MAX_GRAMMAR_CHARS = 65536
MAX_DRAFT_TOKENS = 63
MAX_BRANCHES = 32
MAX_BRANCH_TOKENS = 256
MAX_DRAFTS = 16


class GrammarKind(StrEnum):
    """The language that a grammar's text is written in."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    #: Context-free, in the notation that docs/structured-output.md describes.
    EBNF = "ebnf"
    #: A JSON array of the texts that are allowed.
    CHOICE = "choice"


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the generated text must look like, from its first token to its last."""

    kind: GrammarKind
    text: str


@dataclass(frozen=True, slots=True)
class NgramDrafts:
    """Tokens guessed from n-grams and verified together: the same output in fewer steps.

    max_draft_tokens: nodes of the tree that is verified in one step, >= 1.
    Source: ADED (arXiv 2407.12021).
    """

    max_draft_tokens: int = 8


@dataclass(frozen=True, slots=True)
class CautiousDecoding:
    """Where the model is unsure, try several continuations up to a punctuation and keep the likeliest.

    max_branches >= 2; 0 <= min_entropy < max_entropy, of the warped distribution, in nats;
    max_branch_tokens >= 1 ends a continuation that finds no punctuation.
    Source: CNTP (arXiv 2507.03038).
    """

    max_branches: int = 10
    min_entropy: float = 0.01
    max_entropy: float = 1.5
    max_branch_tokens: int = 20


@dataclass(frozen=True, slots=True)
class SuperposedDecoding:
    """Several short drafts for the price of one; they come out together, at the end.

    num_drafts >= 1. Source: Superposed Decoding (arXiv 2405.18400).
    """

    num_drafts: int = 3


#: How tokens are found beyond one by one; None is one by one.
DecodingMethod = NgramDrafts | CautiousDecoding | SuperposedDecoding


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when a sequence ends.

    max_new_tokens >= 1; temperature >= 0 (0 is greedy); 0 < top_p <= 1; 0 <= seed < 2**64.
    Applied in this order: grammar, min_new_tokens, logit_bias, repetition, presence and frequency penalty,
    temperature, top_k, top_p, min_p.
    """

    max_new_tokens: int
    temperature: float = 0.0
    #: Most likely tokens that are kept; 0 keeps all.
    top_k: int = 0
    top_p: float = 1.0
    #: Tokens less likely than this times the likeliest are left out; 0 <= min_p <= 1.
    min_p: float = 0.0
    #: Of every token of prompt and output: logits above 0 are divided by it, those below multiplied. > 0.
    repetition_penalty: float = 1.0
    #: Subtracted from the logit of each token of the output, once, or as often as it is there.
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    #: (token id, what is added to its logit).
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    #: Stop tokens are ruled out before; counts like max_new_tokens.
    min_new_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    #: Likeliest tokens to report beside each generated one; 0 reports the generated one alone, None nothing.
    num_logprobs: int | None = None
    #: The same for each token of the prompt but the first.
    num_prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    decoding: DecodingMethod | None = None

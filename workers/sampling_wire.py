"""`workers.api.SamplingParams` to and from its message of phasewise.worker.v1. Pure."""

from protos import worker_pb2 as pb
from workers.api import (
    CautiousDecoding,
    DecodingMethod,
    Grammar,
    GrammarKind,
    NgramDrafts,
    SamplingParams,
    SuperposedDecoding,
)

_GRAMMAR_KINDS = {
    GrammarKind.JSON_SCHEMA: pb.GRAMMAR_KIND_JSON_SCHEMA,
    GrammarKind.REGEX: pb.GRAMMAR_KIND_REGEX,
    GrammarKind.EBNF: pb.GRAMMAR_KIND_EBNF,
    GrammarKind.CHOICE: pb.GRAMMAR_KIND_CHOICE,
}
_GRAMMAR_KIND_OF = {value: key for key, value in _GRAMMAR_KINDS.items()}


def sampling_to_pb(sampling: SamplingParams) -> pb.Sampling:
    """As the worker gets it; what has its default is mostly left out."""
    message = pb.Sampling(
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=sampling.seed,
        min_tokens=sampling.min_new_tokens,
        stop_token_ids=sorted(sampling.stop_token_ids),
        num_logprobs=sampling.num_logprobs,
        num_prompt_logprobs=sampling.num_prompt_logprobs,
    )
    if sampling.repetition_penalty != 1.0:
        message.repetition_penalty = sampling.repetition_penalty
    for token_id, bias in sampling.logit_bias:
        message.logit_bias.add(token_id=token_id, bias=bias)
    if sampling.grammar is not None:
        message.grammar.kind = _GRAMMAR_KINDS[sampling.grammar.kind]
        message.grammar.text = sampling.grammar.text
    _put_decoding(message, sampling.decoding)
    return message


def sampling_from_pb(message: pb.Sampling) -> SamplingParams:
    """What an older sender leaves out has its default.

    Raises ValueError for a grammar of a kind that this version does not know: without it the output would be
    another one than was asked for.
    """
    grammar = None
    if message.HasField("grammar"):
        kind = _GRAMMAR_KIND_OF.get(message.grammar.kind)
        if kind is None:
            raise ValueError(
                f"sampling.grammar.kind: is {message.grammar.kind}, which this version does not know"
            )
        grammar = Grammar(kind, message.grammar.text)
    return SamplingParams(
        max_new_tokens=message.max_tokens,
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else 1.0,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=tuple((entry.token_id, entry.bias) for entry in message.logit_bias),
        seed=message.seed,
        min_new_tokens=message.min_tokens,
        stop_token_ids=frozenset(message.stop_token_ids),
        num_logprobs=message.num_logprobs if message.HasField("num_logprobs") else None,
        num_prompt_logprobs=message.num_prompt_logprobs if message.HasField("num_prompt_logprobs") else None,
        grammar=grammar,
        decoding=_decoding_from_pb(message),
    )


def _put_decoding(message: pb.Sampling, decoding: DecodingMethod | None) -> None:
    match decoding:
        case NgramDrafts():
            message.ngram_drafts.max_draft_tokens = decoding.max_draft_tokens
        case CautiousDecoding():
            message.cautious.max_branches = decoding.max_branches
            message.cautious.min_entropy = decoding.min_entropy
            message.cautious.max_entropy = decoding.max_entropy
            message.cautious.max_branch_tokens = decoding.max_branch_tokens
        case SuperposedDecoding():
            message.superposed.num_drafts = decoding.num_drafts


def _decoding_from_pb(message: pb.Sampling) -> DecodingMethod | None:
    match message.WhichOneof("decoding"):
        case "ngram_drafts":
            return NgramDrafts(message.ngram_drafts.max_draft_tokens)
        case "cautious":
            cautious = message.cautious
            return CautiousDecoding(
                cautious.max_branches, cautious.min_entropy, cautious.max_entropy, cautious.max_branch_tokens
            )
        case "superposed":
            return SuperposedDecoding(message.superposed.num_drafts)
        case _:
            return None

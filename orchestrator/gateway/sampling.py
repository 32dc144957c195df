"""The sampling options of a client's request, as workers know them. Pure."""

import json

from protos import inference_pb2 as pb
from workers.api import (
    CautiousDecoding,
    DecodingMethod,
    Grammar,
    GrammarKind,
    NgramDrafts,
    SamplingParams,
    SuperposedDecoding,
)


def sampling_params(
    asked: pb.SamplingParams, *, max_new_tokens: int, seed: int, stop_token_ids: frozenset[int]
) -> SamplingParams:
    """Unchecked, with defaults for what is absent; the arguments are what the message alone does not say."""
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=asked.temperature if asked.HasField("temperature") else 0.0,
        top_k=asked.top_k,
        top_p=asked.top_p if asked.HasField("top_p") else 1.0,
        min_p=asked.min_p,
        repetition_penalty=asked.repetition_penalty if asked.HasField("repetition_penalty") else 1.0,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        logit_bias=tuple(sorted(asked.logit_bias.items())),
        seed=seed,
        min_new_tokens=asked.min_tokens,
        stop_token_ids=stop_token_ids,
        num_logprobs=asked.logprobs if asked.HasField("logprobs") else None,
        num_prompt_logprobs=asked.prompt_logprobs if asked.HasField("prompt_logprobs") else None,
        grammar=_grammar(asked),
        decoding=_decoding(asked),
    )


def _grammar(asked: pb.SamplingParams) -> Grammar | None:
    match asked.WhichOneof("grammar"):
        case "json_schema":
            return Grammar(GrammarKind.JSON_SCHEMA, asked.json_schema)
        case "regex":
            return Grammar(GrammarKind.REGEX, asked.regex)
        case "ebnf":
            return Grammar(GrammarKind.EBNF, asked.ebnf)
        case "choice":
            return Grammar(GrammarKind.CHOICE, json.dumps(list(asked.choice.texts), ensure_ascii=False))
        case None:
            return None


def _decoding(asked: pb.SamplingParams) -> DecodingMethod | None:
    match asked.WhichOneof("decoding"):
        case "ngram_drafts":
            drafts, ngram = asked.ngram_drafts, NgramDrafts()
            return NgramDrafts(
                drafts.max_draft_tokens if drafts.HasField("max_draft_tokens") else ngram.max_draft_tokens
            )
        case "cautious":
            return _cautious(asked.cautious)
        case "superposed":
            number = asked.superposed.num_drafts if asked.superposed.HasField("num_drafts") else None
            return SuperposedDecoding() if number is None else SuperposedDecoding(number)
        case None:
            return None


def _cautious(asked: pb.CautiousDecoding) -> CautiousDecoding:
    default = CautiousDecoding()
    return CautiousDecoding(
        max_branches=asked.max_branches if asked.HasField("max_branches") else default.max_branches,
        min_entropy=asked.min_entropy if asked.HasField("min_entropy") else default.min_entropy,
        max_entropy=asked.max_entropy if asked.HasField("max_entropy") else default.max_entropy,
        max_branch_tokens=(
            asked.max_branch_tokens if asked.HasField("max_branch_tokens") else default.max_branch_tokens
        ),
    )

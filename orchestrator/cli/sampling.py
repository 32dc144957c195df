"""How tokens are chosen: the arguments of `generate` and `chat`, and the message that they make."""

import argparse

from orchestrator.cli import arguments
from protos import inference_pb2 as pb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All but the length limit. Ranges are the gateway's to check."""
    _add_choosing(parser)
    _add_ends(parser)
    _add_reports(parser)
    _add_form(parser)


def _add_choosing(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("choosing tokens")
    add = group.add_argument
    add("--temperature", type=float, metavar="T", help="0 always takes the likeliest token (default: 0)")
    add(
        "--top-k",
        type=arguments.count_or_zero,
        metavar="K",
        help="draw from so many tokens (default: 0, all)",
    )
    add("--top-p", type=float, metavar="P", help="draw from the likeliest tokens of this share (default: 1)")
    add("--min-p", type=float, metavar="P", help="leave out what is less likely than P times the likeliest")
    add("--repetition-penalty", type=float, metavar="X", help="above 1: avoid tokens of prompt and output")
    add("--presence-penalty", type=float, metavar="X", help="above 0: avoid tokens of the output")
    add("--frequency-penalty", type=float, metavar="X", help="the same, the more often they are there")
    add(
        "--logit-bias",
        type=arguments.token_bias,
        action="append",
        default=[],
        metavar="ID=BIAS",
        help="make a token likelier, or less likely; may be given several times",
    )
    add("--seed", type=arguments.seed, metavar="N", help="same seed, same text (default: a random one)")
    add("--n", type=arguments.count, metavar="N", help="samples of the same prompt (default: 1)")


def _add_ends(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where it ends")
    add = group.add_argument
    add("--min-tokens", type=arguments.count_or_zero, metavar="N", help="go on at least so long (default: 0)")
    add(
        "--stop",
        type=arguments.utf8,
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may be given several times",
    )
    add(
        "--stop-token-id",
        type=arguments.token_id,
        action="append",
        default=[],
        metavar="ID",
        help="also end at this token; may be given several times",
    )
    add("--ignore-eos", action="store_true", help="go on after the model's end token")


def _add_reports(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what the model thought")
    add = group.add_argument
    add(
        "--logprobs",
        type=arguments.count_or_zero,
        metavar="N",
        help="show each token's logprob, and the N likeliest tokens",
    )
    add("--prompt-logprobs", type=arguments.count_or_zero, metavar="N", help="the same for the prompt")


def _add_form(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the form of the text (one of these)").add_mutually_exclusive_group()
    add = group.add_argument
    add(
        "--json-schema", type=arguments.json_or_file, metavar="FILE|JSON", help="JSON that this schema allows"
    )
    add("--regex", type=arguments.utf8, metavar="REGEX", help="text that matches as a whole")
    add("--grammar", type=arguments.text_file, metavar="FILE", help="text of this context-free grammar")
    add(
        "--choice",
        type=arguments.utf8,
        action="append",
        default=[],
        metavar="TEXT",
        help="this text or another --choice",
    )
    group = parser.add_argument_group("decoding method (one of these)").add_mutually_exclusive_group()
    add = group.add_argument
    add("--ngram-drafts", action="store_true", help="guess tokens from n-grams: same text, fewer steps")
    add("--cautious", action="store_true", help="where the model is unsure try several continuations")
    add("--superposed", type=arguments.count, metavar="K", help="K short drafts for the price of one")


def sampling_params(args: argparse.Namespace) -> pb.SamplingParams:
    """What `add_arguments` was given, with args.max_tokens."""
    return pb.SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        # Of several for one token the last counts.
        logit_bias=dict(args.logit_bias),
        seed=args.seed,
        n=args.n,
        min_tokens=args.min_tokens,
        stop=args.stop,
        stop_token_ids=args.stop_token_id,
        ignore_eos=args.ignore_eos,
        logprobs=args.logprobs,
        prompt_logprobs=args.prompt_logprobs,
        json_schema=args.json_schema,
        regex=args.regex,
        ebnf=args.grammar,
        choice=pb.Choices(texts=args.choice) if args.choice else None,
        ngram_drafts=pb.NgramDrafts() if args.ngram_drafts else None,
        cautious=pb.CautiousDecoding() if args.cautious else None,
        superposed=None if args.superposed is None else pb.SuperposedDecoding(num_drafts=args.superposed),
    )

"""`phasewise generate`: continue a text or token ids, as they are."""

import argparse
import json
import sys
from typing import Any

import grpc

from orchestrator import interruptible
from orchestrator.cli import arguments, exit_codes, images, request, target, timeline
from orchestrator.cli.proto_json import fields
from orchestrator.errors import BrokenAnswer, DeploymentNotFound
from orchestrator.runtime.registry import Registry
from protos import inference_pb2 as pb

DEFAULT_MAX_TOKENS = 128

EXAMPLES = """\
examples:
  phasewise generate "The capital of France is" --max-tokens 16
  phasewise generate "Once upon a time" --temperature 0.8 --seed 7 --timeline
  phasewise generate "Dear" --n 3 --temperature 1 --stop "."
  phasewise generate "The sky is" --choice blue --choice grey --logprobs 2
  phasewise generate "Left <image> and right <image> show" --image left.png --image right.png
  cat prompt.txt | phasewise generate - --name laptop
  phasewise generate --token-ids 504,3575,282 --json --address 127.0.0.1:8480

The text is sent as it is, without the model's chat template; `phasewise chat` uses the template. Of pictures the
text has the model's placeholder, such as <image>, once for each and in order.
With --json every message of the gateway is one line of JSON. Ctrl-C cancels the request.

exit codes: 0 generated, 1 refused or failed, 2 wrong command line, 4 no such deployment, no gateway or
no worker ready, 130 interrupted
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "generate",
        help="continue a text or token ids as they are",
        description="Continue a text or token ids and print the new text as it comes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument(
        "prompt", nargs="?", type=arguments.utf8, metavar="PROMPT", help="text; - reads it from stdin"
    )
    prompt.add_argument("--token-ids", type=arguments.token_ids, metavar="ID,ID,...", help="tokens instead")
    images.add_argument(parser, "whose placeholder is in PROMPT")
    target.add_arguments(parser)
    request.add_arguments(parser, default_max_tokens=DEFAULT_MAX_TOKENS)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print one JSON object for each message")
    how.add_argument("--timeline", action="store_true", help="show afterwards what the time went to")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit code."""
    try:
        address = target.gateway_address(args, Registry())
        asked = _generate_request(args)
    except DeploymentNotFound as error:
        print(error, file=sys.stderr)
        return exit_codes.UNREACHABLE
    except argparse.ArgumentTypeError as error:
        print(error, file=sys.stderr)
        return exit_codes.USAGE
    try:
        with request.printer(args) as printer:
            show = _print_json if args.json else printer.take
            answer = request.stream(address, asked, timeout_s=args.timeout_s, on_message=show)
            interruptible.run(answer)
    except grpc.RpcError as error:
        return target.failed(address, error)
    except BrokenAnswer as error:
        print(error, file=sys.stderr)
        return exit_codes.FAILURE
    if args.timeline:
        print("\n" + "\n".join(timeline.lines_of_all(printer.ends)))
    return exit_codes.OK


def as_json(response: pb.GenerateResponse) -> dict[str, Any]:
    """A message with the names of inference.proto; what is not set is left out. Durations are in seconds."""
    found: dict[str, Any] = {
        "request_id": response.request_id,
        "sample_index": response.sample_index,
        "first_token_index": response.first_token_index,
        "token_ids": list(response.token_ids),
        "text_delta": response.text_delta,
    }
    if response.logprobs:
        found["logprobs"] = [_logprobs(token) for token in response.logprobs]
    if response.prompt_logprobs:
        found["prompt_logprobs"] = [_logprobs(token) for token in response.prompt_logprobs]
    if response.drafts:
        found["drafts"] = [
            {"token_ids": list(draft.token_ids), "text": draft.text, "logprob": draft.logprob}
            for draft in response.drafts
        ]
    if response.finish_reason != pb.FINISH_REASON_UNSPECIFIED:
        name = pb.FinishReason.Name(response.finish_reason)
        found["finish_reason"] = name.removeprefix("FINISH_REASON_").lower()
    if response.stop_text:
        found["stop_text"] = response.stop_text
    if response.HasField("usage"):
        found["usage"] = fields(response.usage)
        if response.usage.HasField("decoding"):
            found["usage"]["decoding"] = fields(response.usage.decoding)
        if response.usage.HasField("image_reduction"):
            found["usage"]["image_reduction"] = fields(response.usage.image_reduction)
    if response.HasField("timings"):
        found["timings"] = fields(response.timings)
        if response.timings.HasField("kv_transfer"):
            found["timings"]["kv_transfer"] = fields(response.timings.kv_transfer)
        if response.timings.encodes:
            found["timings"]["encodes"] = [fields(shard) for shard in response.timings.encodes]
    return found


def _generate_request(args: argparse.Namespace) -> pb.GenerateRequest:
    if args.token_ids is not None:
        if args.image:
            raise argparse.ArgumentTypeError("--image needs a PROMPT with a placeholder, not --token-ids")
        asked = pb.GenerateRequest(token_ids=pb.TokenIds(ids=args.token_ids))
    else:
        pictures = images.to_pb(images.read_images(args.image))
        asked = pb.GenerateRequest(text=arguments.text_or_stdin(args.prompt), images=pictures)
    return request.fill(asked, args)


def _print_json(response: pb.GenerateResponse) -> None:
    print(json.dumps(as_json(response)), flush=True)


def _logprobs(token: pb.TokenLogprobs) -> dict[str, Any]:
    found = fields(token)
    if token.top:
        found["top"] = [fields(other) for other in token.top]
    return found

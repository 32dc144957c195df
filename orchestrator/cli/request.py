"""One request to a gateway: its arguments, and its answer as it streams."""

import argparse
from collections.abc import Callable
from typing import Self

from orchestrator.cli import arguments, target
from orchestrator.cli.progress import shown_wait
from orchestrator.errors import BrokenAnswer
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceServiceStub


def add_arguments(parser: argparse.ArgumentParser, *, default_max_tokens: int | None) -> None:
    """How tokens are chosen, and when the request ends. Without a default the context is the limit."""
    limit = "the rest of the context" if default_max_tokens is None else str(default_max_tokens)
    parser.add_argument(
        "--max-tokens",
        type=arguments.count,
        default=default_max_tokens,
        metavar="N",
        help=f"new tokens at most (default: {limit})",
    )
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="0 always takes the likeliest token (default: 0)"
    )
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the likeliest tokens of this share (default: 1)"
    )
    parser.add_argument(
        "--seed", type=arguments.seed, metavar="N", help="same seed, same text (default: a random one)"
    )
    parser.add_argument(
        "--stop-token-id",
        type=arguments.token_id,
        action="append",
        default=[],
        metavar="ID",
        help="also end at this token; may be given several times",
    )
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the model's end token")
    parser.add_argument(
        "--timeout-s",
        type=arguments.number,
        metavar="S",
        help="deadline of the request (default: the deployment's)",
    )


def sampling_params(args: argparse.Namespace) -> pb.SamplingParams:
    """What `add_arguments` was given."""
    return pb.SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        stop_token_ids=args.stop_token_id,
        ignore_eos=args.ignore_eos,
    )


class TextPrinter:
    """Prints the text of an answer as it comes, and ends its line when left, for whatever reason."""

    def __init__(self) -> None:
        self._parts: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._parts and not self._parts[-1].endswith("\n"):
            print(flush=True)

    @property
    def text(self) -> str:
        """All that came so far."""
        return "".join(self._parts)

    def take(self, response: pb.GenerateResponse) -> None:
        """Print the text of one message, at once."""
        if response.text_delta:
            self._parts.append(response.text_delta)
            print(response.text_delta, end="", flush=True)


async def stream(
    address: str,
    request: pb.GenerateRequest,
    *,
    timeout_s: float | None,
    on_message: Callable[[pb.GenerateResponse], None],
) -> pb.GenerateResponse:
    """Run one request and hand over each message; returns the last one, which has usage and timings.

    Leaving it early, as Ctrl-C does, cancels the request. Raises grpc.RpcError, BrokenAnswer.
    """
    last = pb.GenerateResponse()
    async with target.connect(address) as channel:
        call = InferenceServiceStub(channel).Generate(request, timeout=timeout_s)
        try:
            with shown_wait("waiting for the first token") as came:
                async for response in call:
                    came()
                    on_message(response)
                    last = response
        finally:
            call.cancel()
    if last.finish_reason == pb.FINISH_REASON_UNSPECIFIED:
        raise BrokenAnswer(address)
    return last


async def model_info(address: str, *, timeout_s: float) -> pb.GetModelInfoResponse:
    """What the gateway serves. Raises grpc.RpcError."""
    async with target.connect(address) as channel:
        return await InferenceServiceStub(channel).GetModelInfo(pb.GetModelInfoRequest(), timeout=timeout_s)

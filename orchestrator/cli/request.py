"""One request to a gateway: its arguments, and its answer as it streams."""

import argparse
from collections.abc import Callable

from orchestrator.cli import arguments, images, sampling, target
from orchestrator.cli.answer_printer import AnswerPrinter
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
        "--timeout-s",
        type=arguments.number,
        metavar="S",
        help="deadline of the request (default: the deployment's)",
    )
    parser.add_argument(
        "--priority",
        type=arguments.integer,
        default=0,
        metavar="N",
        help="higher ones start first and are preempted last (default: 0)",
    )
    parser.add_argument(
        "--cache-salt",
        type=arguments.utf8,
        default="",
        metavar="TEXT",
        help="share cached prompts only with requests of the same salt",
    )
    parser.add_argument(
        "--image-reduction",
        type=images.reduction,
        metavar="off|KEY=X,...",
        help="fewer embeddings of pictures: merge=X, global=X, individual=X and keys=X, each 0 to 1, see "
        "docs/multimodal.md (default: the deployment's)",
    )
    sampling.add_arguments(parser)


def fill(request: pb.GenerateRequest, args: argparse.Namespace) -> pb.GenerateRequest:
    """The request, which has a prompt, with what `add_arguments` was given."""
    request.sampling.CopyFrom(sampling.sampling_params(args))
    request.priority = args.priority
    request.cache_salt = args.cache_salt
    if args.image_reduction is not None:
        request.image_reduction.CopyFrom(args.image_reduction)
    return request


def printer(args: argparse.Namespace) -> AnswerPrinter:
    """For the answer of one request with these arguments."""
    return AnswerPrinter(args.n or 1)


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
    if not last.HasField("usage"):
        raise BrokenAnswer(address)
    return last


async def model_info(address: str, *, timeout_s: float) -> pb.GetModelInfoResponse:
    """What the gateway serves. Raises grpc.RpcError."""
    async with target.connect(address) as channel:
        return await InferenceServiceStub(channel).GetModelInfo(pb.GetModelInfoRequest(), timeout=timeout_s)

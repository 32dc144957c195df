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
from dataclasses import replace
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
from workers.options import computes_on_gpu, make_parser
from workers.options_check import options_problem
from workers.step_shape import StepCosts

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal or Shutdown; returns the exit code."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    problem = options_problem(arguments)
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


def _kv_cache_bytes(arguments: argparse.Namespace) -> int:
    if arguments.kv_cache_mib is not None:
        return int(arguments.kv_cache_mib * MIB)
    return 0 if computes_on_gpu(arguments) else EngineConfig().kv_cache_bytes


def _weight_dtype(arguments: argparse.Namespace) -> WeightDtype:
    if arguments.weight_dtype is not None:
        return WeightDtype(arguments.weight_dtype)
    return WeightDtype.BFLOAT16 if computes_on_gpu(arguments) else WeightDtype.FLOAT32


def _tile_tokens(arguments: argparse.Namespace) -> int:
    if arguments.tile_tokens is not None:
        return int(arguments.tile_tokens)
    return limits.default_tile_tokens(arguments.token_budget, is_on_gpu=computes_on_gpu(arguments))


def _span_reuse(arguments: argparse.Namespace) -> SpanReuseConfig | None:
    if arguments.span_recompute is None:
        return None
    return SpanReuseConfig(arguments.span_recompute, arguments.span_min_tokens)


if __name__ == "__main__":
    missing = missing_variables(os.environ)
    if missing:
        # Read by the C library at process start, so the process starts over; this time none is missing.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing})  # noqa: S606 - no shell
    sys.exit(main())

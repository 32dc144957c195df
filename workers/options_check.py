"""Whether options that are right each fit together."""

import argparse

from kvtransfer.config import TransportChoice
from workers import limits
from workers.api import HostCacheCodec, KvDtype, Phase, PhaseSharing
from workers.options import computes_on_gpu


def options_problem(arguments: argparse.Namespace) -> str | None:
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
    is_on_gpu, dtype = computes_on_gpu(arguments), arguments.weight_dtype
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
        is_on_gpu=computes_on_gpu(arguments),
        tensor_parallel=arguments.tensor_parallel,
        phases=arguments.phases,
        step_budget=arguments.step_budget,
    )
    if arguments.phase_sharing == PhaseSharing.MIXED or why is None:
        return None
    return f"argument --phase-sharing: is {arguments.phase_sharing}; it must be mixed {why}"

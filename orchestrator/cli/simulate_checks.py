"""What `phasewise simulate` does not simulate, and says so instead."""

import argparse

from kvtransfer.codecs.codec import CodecId
from orchestrator.bench.trace import Trace
from orchestrator.cli import step_times
from orchestrator.control.admission import Admission
from orchestrator.control.auto_switch import SwitchMode
from orchestrator.control.declared import DeclaredWorker
from orchestrator.manifest.declare import switch_mode_of, worker_specs
from orchestrator.manifest.models import Deployment
from orchestrator.sim import coarse_replay
from orchestrator.sim.coarse_costs import why_not_encoding
from orchestrator.sim.coarse_device import GROWTH_RESERVE
from workers.api import Batching, KvDtype, Phase, PhaseSharing, WeightDtype
from workers.latency_model import LatencyModel

#: Of one number of a matrix.
ONE_BYTE = frozenset({WeightDtype.INT8, WeightDtype.FP8})


def problem(args: argparse.Namespace, deployment: Deployment, latency: LatencyModel) -> str | None:
    """Why it cannot be simulated, and what to do."""
    if args.json and not args.json.absolute().parent.is_dir():
        return f"--json {args.json}: there is no such folder"
    if args.plot and not (
        args.plot.is_dir() or (args.plot.absolute().parent.is_dir() and not args.plot.exists())
    ):
        return f"--plot {args.plot}: there is no such folder, and it cannot be made"
    if args.mode == "coarse" and args.faults:
        return (
            "--faults: --mode coarse has no messages or processes that could fail; leave out one of the two"
        )
    if args.mode == "coarse" and (refusal := coarse_replay.reason_to_refuse(worker_specs(deployment))):
        return f"{args.manifest}: {refusal}"
    if args.mode == "coarse" and (found := _left_out_coarsely(deployment)):
        return "\n".join(f"{args.manifest}: {sentence}" for sentence in found)
    if deployment.spec.gateway.image_reduction is not None:
        return f"{args.manifest}: gateway.imageReduction is not simulated: pictures keep all embeddings; leave it out of the manifest"
    model, device = latency.model, latency.device
    weights = (model.num_weights + model.num_head_weights) * model.weight_bytes
    for declared in worker_specs(deployment):
        if left_out := _left_out(declared, latency, is_known=args.profile is None):
            return "\n".join(
                f"{declared.worker_id}: {sentence}; leave it out of the manifest" for sentence in left_out
            )
        if not declared.engine.kv_cache_bytes:
            return f"{declared.worker_id}: engine.kvCacheMiB is needed here: a simulated GPU has no free memory to look at"
        needed = weights + declared.engine.kv_cache_bytes
        if needed > device.memory_bytes:
            return (
                f"{declared.worker_id}: {model.name} has {weights / 1e9:.0f} GB of weights and engine.kvCacheMiB is "
                f"{declared.engine.kv_cache_bytes / 1e9:.0f} GB; one {device.name} has {device.memory_bytes / 1e9:.0f} GB"
            )
    return None


def pictures_problem(
    args: argparse.Namespace, deployment: Deployment, latency: LatencyModel, trace: Trace
) -> str | None:
    """Why the trace's pictures cannot be simulated."""
    if not any(row.num_images for row in trace.rows):
        return None
    if not is_encoding(deployment):
        return f"{args.trace}: has pictures, and no worker of {args.manifest} encodes"
    if why_not := why_not_encoding(latency.device.name):
        return f"{args.trace}: has pictures, with {step_times.device_option(args)}: {why_not}"
    return None


def is_encoding(deployment: Deployment) -> bool:
    """Some worker takes pictures."""
    return any(Phase.ENCODE in worker.phases for worker in worker_specs(deployment))


def _left_out(declared: DeclaredWorker, latency: LatencyModel, *, is_known: bool) -> list[str]:
    """Settings that would make a difference and do not here, and what is simulated. is_known: by --model and --device, without a profile."""
    engine, model = declared.engine, latency.model
    found = []
    if engine.host_cache_bytes:
        found.append("engine.hostCacheMiB is not simulated: evicted blocks are lost")
    if engine.span_reuse is not None:
        found.append("engine.spanReuse is not simulated: prompts share beginnings alone")
    if declared.kv_transfer.codec is not CodecId.NONE:
        found.append("kvTransfer.codec is not simulated: KV travels unpacked")
    if engine.tensor_parallel > 1:
        gpus = declared.resources.num_gpus
        key = f"resources.gpus: {gpus}" if gpus > 1 else f"engine.tensorParallel: {engine.tensor_parallel}"
        found.append(f"{key} is not simulated: a worker is one {latency.device.name}")
    if engine.weight_dtype in ONE_BYTE and model.weight_bytes >= 2:
        sentence = f"{engine.weight_dtype} is not simulated: a weight of {model.name} has {model.weight_bytes:g} bytes"
        found.append(f"engine.weightDtype: {sentence}")
    if engine.kv_dtype is not KvDtype.AUTO and is_known:
        sentence = f"{engine.kv_dtype} is not simulated: a token of {model.name} has {model.kv_token_bytes} bytes of KV"
        found.append(f"engine.kvDtype: {sentence}")
    if engine.phase_sharing is not PhaseSharing.MIXED:
        found.append(
            f"engine.phaseSharing: {engine.phase_sharing} is not simulated: prompts and decodes are in steps together"
        )
    return found


def _left_out_coarsely(deployment: Deployment) -> list[str]:
    """The same of --mode coarse, which takes one engine for all workers."""
    found = []
    if switch_mode_of(deployment) is not SwitchMode.OFF:
        found.append("--mode coarse has no controller; leave out controller.roleSwitch")
    if Admission(deployment.spec.gateway.admission) is not Admission.OFF:
        found.append("--mode coarse takes every request; leave out gateway.admission")
    engine = worker_specs(deployment)[0].engine
    if engine.batching is not Batching.STALL_FREE:
        found.append(f"--mode coarse has {Batching.STALL_FREE} steps alone; leave out engine.batching")
    if engine.growth_reserve != GROWTH_RESERVE:
        found.append(f"--mode coarse keeps {GROWTH_RESERVE:g} for growth; leave out engine.growthReserve")
    return found

"""What `phasewise simulate` does not simulate, and says so instead."""

import argparse

from kvtransfer.codecs.codec import CodecId
from orchestrator.control.auto_switch import SwitchMode
from orchestrator.control.declared import DeclaredWorker
from orchestrator.manifest.declare import switch_mode_of, worker_specs
from orchestrator.manifest.models import Deployment
from orchestrator.sim import coarse_replay
from workers.api import Phase
from workers.latency_model import LatencyModel


def problem(args: argparse.Namespace, deployment: Deployment, latency: LatencyModel) -> str | None:
    """Why it cannot be simulated, and what to do."""
    if args.json and not args.json.absolute().parent.is_dir():
        return f"--json {args.json}: there is no such folder"
    if args.plot and not (
        args.plot.is_dir() or (args.plot.absolute().parent.is_dir() and not args.plot.exists())
    ):
        return f"--plot {args.plot}: there is no such folder, and it cannot be made"
    if args.mode == "coarse" and (refusal := coarse_replay.reason_to_refuse(worker_specs(deployment))):
        return f"{args.manifest}: {refusal}"
    if args.mode == "coarse" and switch_mode_of(deployment) is not SwitchMode.OFF:
        return f"{args.manifest}: --mode coarse has no controller; leave out controller.roleSwitch"
    model, device = latency.model, latency.device
    weights = (model.num_weights + model.num_head_weights) * model.weight_bytes
    for declared in worker_specs(deployment):
        left_out = _left_out(declared)
        if left_out:
            return f"{declared.worker_id}: {left_out} is not simulated; leave it out of the manifest"
        if not declared.engine.kv_cache_bytes:
            return f"{declared.worker_id}: engine.kvCacheMiB is needed here: a simulated GPU has no free memory to look at"
        needed = weights + declared.engine.kv_cache_bytes
        if needed > device.memory_bytes:
            return (
                f"{declared.worker_id}: {model.name} has {weights / 1e9:.0f} GB of weights and engine.kvCacheMiB is "
                f"{declared.engine.kv_cache_bytes / 1e9:.0f} GB; one {device.name} has {device.memory_bytes / 1e9:.0f} GB"
            )
    return None


def is_encoding(deployment: Deployment) -> bool:
    """Some worker takes pictures."""
    return any(Phase.ENCODE in worker.phases for worker in worker_specs(deployment))


def _left_out(declared: DeclaredWorker) -> str:
    """A setting that would make a difference, and does not here."""
    if declared.engine.host_cache_bytes:
        return "engine.hostCacheMiB"
    if declared.engine.span_reuse is not None:
        return "engine.spanReuse"
    return "" if declared.kv_transfer.codec is CodecId.NONE else "kvTransfer.codec"

"""What a policy saw to and from phasewise.control.v1. Pure."""

from dataclasses import astuple, fields

from orchestrator.control.look import Look
from orchestrator.control.policies.policy import (
    ANY_PHASES,
    FIRST_SWITCH_COST,
    ClusterLoad,
    SwitchCost,
    WorkerLoad,
)
from orchestrator.control.scaling_config import ScalingConfig
from orchestrator.control.slo import Slo
from orchestrator.control.view_wire import totals_from_pb, totals_to_pb
from protos import control_pb2 as pb
from workers.api import WorkerId
from workers.step_cost import StepCost
from workers.wire import phases_from_pb, phases_to_pb

#: Of ScalingConfig, all but the workers.
_SETTINGS = tuple(one.name for one in fields(ScalingConfig) if one.name != "extra")


def look_to_pb(look: Look) -> pb.Look:
    """All of it, with its digest."""
    return pb.Look(
        at_s=look.at_s,
        workers=map(_worker_to_pb, look.load.workers),
        totals=totals_to_pb(look.load.totals),
        cost=astuple(look.cost),
        ttft_s=look.slo.ttft_s,
        tpot_s=look.slo.tpot_s,
        digest=look.digest,
        tile_s=look.tile_s,
        change_s=look.switch_cost.change_s,
        replace_s=look.switch_cost.replace_s,
        allowed=[pb.PhaseSet(phases=phases_to_pb(one)) for one in look.allowed],
        scaling=_scaling_to_pb(look),
    )


def look_from_pb(message: pb.Look) -> Look:
    """All of it. Raises ValueError when its costs are not six numbers."""
    if len(message.cost) != 6:
        raise ValueError(f"cost: has {len(message.cost)} numbers; a look has 6")
    load = ClusterLoad(tuple(map(_worker_from_pb, message.workers)), totals_from_pb(message.totals))
    # Looks of the version before tell of no costs, nor of what processes have loaded.
    has_costs = message.change_s > 0 or message.replace_s > 0
    return Look(
        message.at_s,
        load,
        StepCost(*message.cost),
        Slo(message.ttft_s, message.tpot_s),
        message.tile_s,
        SwitchCost(message.change_s, message.replace_s) if has_costs else FIRST_SWITCH_COST,
        tuple(phases_from_pb(one.phases) for one in message.allowed),
        _scaling_from_pb(message.scaling) if message.HasField("scaling") else None,
        tuple(map(WorkerId, message.scaling.waiting)),
    )


def _scaling_to_pb(look: Look) -> pb.LookScaling | None:
    """Of those that may be added only how many, as there is a look each second."""
    config = look.scaling
    if config is None:
        return None
    present = {one.worker_id for one in look.load.workers} | set(look.waiting)
    added = [one for one in config.extra if one in present]
    return pb.LookScaling(
        added=added,
        num_free=len(config.extra) - len(added),
        waiting=look.waiting,
        **{name: getattr(config, name) for name in _SETTINGS},
    )


def _scaling_from_pb(message: pb.LookScaling) -> ScalingConfig:
    """Those that were not there have other names than they had."""
    free = [f"more-{i}" for i in range(message.num_free)]
    extra = tuple(map(WorkerId, (*message.added, *free)))
    return ScalingConfig(extra, **{name: getattr(message, name) for name in _SETTINGS})


def _worker_to_pb(worker: WorkerLoad) -> pb.LookWorker:
    return pb.LookWorker(
        worker_id=worker.worker_id,
        phases=phases_to_pb(worker.phases),
        kv_capacity=worker.kv_capacity,
        is_switching=worker.is_switching,
        prefill_tokens=worker.prefill_tokens,
        num_prefills=worker.num_prefills,
        num_decoding=worker.num_decoding,
        decode_context=worker.decode_context,
        num_promised=worker.num_promised,
        promised_context=worker.promised_context,
        kv_tokens=worker.kv_tokens,
        num_decode_steps=worker.num_decode_steps,
        encode_tiles=worker.encode_tiles,
        loaded=phases_to_pb(worker.loaded),
    )


def _worker_from_pb(message: pb.LookWorker) -> WorkerLoad:
    return WorkerLoad(
        WorkerId(message.worker_id),
        phases_from_pb(message.phases),
        kv_capacity=message.kv_capacity,
        is_switching=message.is_switching,
        prefill_tokens=message.prefill_tokens,
        num_prefills=message.num_prefills,
        num_decoding=message.num_decoding,
        decode_context=message.decode_context,
        num_promised=message.num_promised,
        promised_context=message.promised_context,
        kv_tokens=message.kv_tokens,
        num_decode_steps=message.num_decode_steps,
        encode_tiles=message.encode_tiles,
        loaded=phases_from_pb(message.loaded) or ANY_PHASES,
    )

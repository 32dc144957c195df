"""What a policy saw to and from phasewise.control.v1. Pure."""

from dataclasses import astuple

from orchestrator.control.look import Look
from orchestrator.control.policies.policy import (
    ANY_PHASES,
    FIRST_SWITCH_COST,
    ClusterLoad,
    SwitchCost,
    WorkerLoad,
)
from orchestrator.control.slo import Slo
from orchestrator.control.view_wire import totals_from_pb, totals_to_pb
from protos import control_pb2 as pb
from workers.api import WorkerId
from workers.step_cost import StepCost
from workers.wire import phases_from_pb, phases_to_pb


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
    )


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
        kv_tokens=message.kv_tokens,
        num_decode_steps=message.num_decode_steps,
        encode_tiles=message.encode_tiles,
        loaded=phases_from_pb(message.loaded) or ANY_PHASES,
    )

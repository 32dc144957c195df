"""A plan of requests on the workers of a manifest, in the coarse mode, with the result that the fine one gives. Pure."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from orchestrator.bench.plan import PlannedRequest
from orchestrator.bench.records import OK, LoadResult, RequestRecord
from orchestrator.control.declared import DeclaredWorker
from orchestrator.control.policies.aggregated import StallFree
from orchestrator.control.policies.orders import Fcfs, LeastSlack, ShortestFirst
from orchestrator.control.policies.phasewise import MARGIN, PhasewiseConfig, PredictedSteps
from orchestrator.control.policies.placing import LeastLoaded
from orchestrator.control.policies.policy import Order, Policy, Stepping
from orchestrator.control.slo import Slo
from orchestrator.sim.coarse import CoarseConfig, CoarseSimulation
from orchestrator.sim.coarse_costs import CoarseCosts
from orchestrator.sim.coarse_request import CoarseRecord, CoarseRequest
from orchestrator.sim.simulation import SimConfig, SimResult
from workers.api import EngineConfig, Phase, PhaseSet, PrefillOrder, StepBudget
from workers.latency_model import LatencyModel


def reason_to_refuse(declared: Sequence[DeclaredWorker]) -> str:
    """Why these workers cannot be simulated coarsely; empty when they can."""
    engines = {worker.engine for worker in declared}
    return "" if len(engines) == 1 else "--mode coarse takes one engine for all workers"


def simulation(
    shape: tuple[PhaseSet, ...],
    engine: EngineConfig,
    latency: LatencyModel,
    requests: Sequence[CoarseRequest],
) -> CoarseSimulation:
    """Of workers of these phases with one engine. Pictures of a request are spread over all that encode, as the gateway does."""
    costs = CoarseCosts.of(latency)
    least_tpot_s = min((one.slo.tpot_s for one in requests), default=math.inf)
    is_predicted = engine.step_budget is StepBudget.PREDICTED
    planned_s = MARGIN * least_tpot_s if is_predicted else math.inf
    orders: dict[PrefillOrder, Callable[[], Order]] = {
        PrefillOrder.FCFS: Fcfs,
        PrefillOrder.SHORTEST_REMAINING: ShortestFirst,
        PrefillOrder.LEAST_SLACK: lambda: LeastSlack(costs.step, engine.token_budget, planned_s),
    }
    num_encoders = sum(Phase.ENCODE in phases for phases in shape)
    placing = LeastLoaded(most_encoders=max(1, num_encoders))
    stepping: Stepping = StallFree(engine.token_budget)
    if is_predicted and requests:
        least = Slo(requests[0].slo.ttft_s, least_tpot_s)
        stepping = PredictedSteps(
            PhasewiseConfig(
                least,
                costs.step,
                costs.tile_s,
                max_prefill_tokens=engine.token_budget,
                min_chunk_tokens=engine.block_size,
            )
        )
    policy = Policy("as declared", shape, orders[engine.prefill_order], placing, stepping)
    config = CoarseConfig(
        costs,
        engine.kv_cache_bytes // latency.model.kv_token_bytes,
        engine.max_running_sequences,
        engine.is_prefix_cache_on,
    )
    return CoarseSimulation(config, policy, requests)


def replay(
    config: SimConfig,
    plan: Sequence[PlannedRequest],
    duration_s: float,
    slo: Slo,
    on_progress: Callable[[int, int], None],
) -> SimResult:
    """Placing, order and steps are those of the engine and the gateway. Noise, deadlines and faults are left out.

    Tokens between the first and the last of a request are taken as evenly spaced: its ITL is its TPOT.
    """
    shape = tuple(worker.phases for worker in config.declared)
    image_tiles = config.pictures.tiles if config.pictures is not None else 0
    requests = [CoarseRequest.of(one, slo, image_tiles) for one in plan]
    result = simulation(shape, config.declared[0].engine, config.latency, requests).run(on_progress)
    records = tuple(_record(one, record) for one, record in zip(plan, result.records, strict=True))
    load = LoadResult(records, duration_s, result.elapsed_s, was_interrupted=False)
    names = [worker.worker_id for worker in config.declared]
    workers = tuple(replace(use, worker_id=name) for use, name in zip(result.workers, names, strict=True))
    return SimResult(load, workers, (), result.num_events, 0)


def _record(planned: PlannedRequest, record: CoarseRecord) -> RequestRecord:
    if record.status != OK:
        return RequestRecord(planned, record.status, record.message, 0.0)
    gap_s = record.tpot_s or 0.0
    times = tuple(record.first_s + gap_s * index for index in range(planned.output_tokens))
    return RequestRecord(planned, OK, "", 0.0, times, record.last_s)

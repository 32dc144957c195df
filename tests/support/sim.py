"""Small simulated clusters and loads."""

import random
from collections.abc import Iterable, Sequence

from orchestrator.bench.plan import PlannedRequest
from orchestrator.bench.trace import TraceRow
from orchestrator.control.admission import Admission
from orchestrator.control.declared import DeclaredWorker, WorkerResources
from orchestrator.control.known_shapes import DEVICES, MODELS
from orchestrator.control.role_switch import SwitchRequest
from orchestrator.control.slo import NO_SLO, Slo
from orchestrator.sim.faults import Fault
from orchestrator.sim.simulation import SimConfig, SimResult, Simulation
from workers.api import EngineConfig, KvTransferConfig, Phase, PhaseSet, WorkerId
from workers.latency_model import LatencyModel
from workers.step_shape import DeviceShape, ModelShape

P, D = frozenset({Phase.PREFILL}), frozenset({Phase.DECODE})
BOTH = P | D
ENGINE = EngineConfig(
    kv_cache_bytes=2 * 10**9, token_budget=512, max_running_sequences=64, max_waiting_requests=1000
)
LLAMA_ON_H100 = LatencyModel(MODELS["llama-3-8b"], DEVICES["h100"], is_learning=False)


def worker(name: str, phases: PhaseSet, engine: EngineConfig = ENGINE) -> DeclaredWorker:
    kv_transfer = KvTransferConfig(lease_s=5.0, resume_s=1.0)
    return DeclaredWorker(WorkerId(name), phases, "simulated", WorkerResources(1), engine, kv_transfer)


SHAPES = {
    "one": (worker("w0", BOTH),),
    "two": (worker("w0", BOTH), worker("w1", BOTH)),
    "apart": (worker("p0", P), worker("d0", D)),
    "two apart": (worker("p0", P), worker("p1", P), worker("d0", D), worker("d1", D)),
    "mixed": (worker("w0", BOTH), worker("p0", P), worker("d0", D)),
}


def constant(step_s: float) -> LatencyModel:
    """Every step takes so long."""
    device = DeviceShape("constant", 1e30, 1e30, 1e30, step_s, 1e30, 1e30)
    return LatencyModel(MODELS["smollm2-135m"], device, is_learning=False)


def by_token(token_s: float) -> LatencyModel:
    """Every token of a step takes so long, and nothing else takes any time."""
    model = ModelShape("by_token", 10**6, 0, 0.0, 1, 1, 64)
    device = DeviceShape("by_token", 2.0 * model.num_weights / token_s, 1e30, 1e30, 0.0, 1e30, 1e30)
    return LatencyModel(model, device, is_learning=False)


def load(requests: Iterable[tuple[float, int, int]]) -> list[PlannedRequest]:
    """(arrival in seconds, tokens of the prompt, tokens of the output) each."""
    rows = [(TraceRow(n, at_s, prompt, output), at_s) for n, (at_s, prompt, output) in enumerate(requests, 1)]
    return [PlannedRequest(row, at_s, row.prompt_tokens, row.output_tokens) for row, at_s in rows]


def random_load(seed: int, num_requests: int = 40, rate_rps: float = 8.0) -> list[PlannedRequest]:
    rng = random.Random(seed)
    at_s, found = 0.0, []
    for _ in range(num_requests):
        at_s += rng.expovariate(rate_rps)
        found.append((at_s, rng.randint(1, 3000), rng.randint(1, 120)))
    return load(found)


def run(
    shape: Sequence[DeclaredWorker],
    plan: Sequence[PlannedRequest],
    latency: LatencyModel = LLAMA_ON_H100,
    *,
    seed: int = 0,
    faults: tuple[Fault, ...] = (),
    noise: float = 0.03,
    timeout_s: float = 60.0,
    check_every: int = 400,
    is_cache_told: bool = True,
    switches: tuple[tuple[float, SwitchRequest], ...] = (),
    slo: Slo = NO_SLO,
    admission: Admission = Admission.OFF,
) -> tuple[SimResult, Simulation]:
    """One run, with all invariants checked now and then, and at its end that nobody holds anything."""
    config = SimConfig(
        tuple(shape),
        latency,
        seed=seed,
        noise=noise,
        load_s=1.0,
        timeout_s=timeout_s,
        max_context_tokens=16_384,
        faults=faults,
        check_every=check_every,
        is_cache_told=is_cache_told,
        switches=switches,
        slo=slo,
        admission=admission,
    )
    simulation = Simulation(config, plan, plan[-1].arrival_s)
    result = simulation.run()
    assert result.num_wrong_tokens == 0
    assert_nothing_held(simulation)
    return result, simulation


def assert_nothing_held(simulation: Simulation) -> None:
    """Leases that were cut off have expired by then: no block is anybody's."""
    until_s = simulation.timers.time() + 60.0
    while simulation.timers.run_next(until_s):
        pass
    simulation.check_invariants()
    for process in simulation.cluster.living():
        counts = process.engine.block_counts()
        assert counts.in_use == counts.leased == 0, (process.spec.worker_id, counts)
        assert process.engine.num_leases == 0
        assert process.engine.num_waiting == process.engine.num_running == 0

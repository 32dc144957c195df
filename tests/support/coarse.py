"""Small coarse simulations."""

import random
from collections.abc import Callable, Sequence

from orchestrator.control.known_shapes import DEVICES, MODELS
from orchestrator.control.policies.aggregated import StallFree
from orchestrator.control.policies.orders import Fcfs, LeastSlack
from orchestrator.control.policies.placing import LeastLoaded
from orchestrator.control.policies.policy import ClusterLoad, Order, Placing, Policy, Stepping, Switch
from orchestrator.control.policies.policy import no_switches as never
from orchestrator.control.slo import Slo
from orchestrator.sim.coarse import CoarseConfig, CoarseResult, CoarseSimulation
from orchestrator.sim.coarse_costs import CoarseCosts
from orchestrator.sim.coarse_request import CoarseRequest
from workers.api import Phase, PhaseSet
from workers.latency_model import LatencyModel
from workers.step_choice import Split

E, P, D = (frozenset({phase}) for phase in Phase)
SLO = Slo(0.5, 0.03)
COSTS = CoarseCosts.of(LatencyModel(MODELS["llama-3-8b"], DEVICES["h100"], is_learning=False))


def check_split(step: Split) -> None:
    """The two sides together have no more of a device's SMs for themselves than there are, whoever divided it.

    Of shares that are set apart these are the shares. Of limits (`Split.is_binding`) it is what the limit of the other side leaves, so
    that these may overlap, and leave no SM that neither side may use.
    """
    shares = step.prefill_share, step.decode_share
    assert 0 < min(shares) <= max(shares) <= 1, step
    alone = (1 - step.decode_share, 1 - step.prefill_share) if step.is_binding else shares
    assert sum(alone) <= 1 + 1e-9, step


def slack_order(weights: dict[str, float] | None = None) -> LeastSlack:
    """Of steps as long as the target for TPOT."""
    return LeastSlack(COSTS.step, 2048, SLO.tpot_s, weights)


def policy(
    shape: Sequence[PhaseSet],
    *,
    stepping: Stepping | None = None,
    placing: Placing | None = None,
    order: Callable[[], Order] = Fcfs,
    tick: Callable[[float, ClusterLoad], Sequence[Switch]] = never,
) -> Policy:
    return Policy("tested", tuple(shape), order, placing or LeastLoaded(), stepping or StallFree(512), tick)


def run(
    one: Policy,
    requests: Sequence[CoarseRequest],
    *,
    kv_tokens: int = 400_000,
    costs: CoarseCosts = COSTS,
    max_sequences: int = 256,
) -> tuple[CoarseResult, CoarseSimulation]:
    """One run, and at its end nobody holds anything."""
    simulation = CoarseSimulation(CoarseConfig(costs, kv_tokens, max_sequences), one, requests)
    result = simulation.run()
    simulation.check_invariants()
    return result, simulation


def random_load(
    seed: int, num_requests: int = 60, rate_rps: float = 20.0, *, has_images: bool = False
) -> list[CoarseRequest]:
    rng = random.Random(seed)
    at_s, found = 0.0, []
    for _ in range(num_requests):
        at_s += rng.expovariate(rate_rps)
        num_tiles = rng.choice((0, 3, 20)) if has_images else 0
        blocks = tuple(rng.randint(0, 3) * 100 + i for i in range(6))
        prompt, output = rng.randint(1, 3000), rng.randint(1, 120)
        found.append(CoarseRequest(at_s, prompt, output, SLO, blocks, num_tiles, rng.choice("ab")))
    return found

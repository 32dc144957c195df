"""Every policy by its name, ready to run on so many workers. Pure."""

from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.control.policies.aggregated import PrefillFirst, StallFree
from orchestrator.control.policies.disaggregated import Conductor, EpdQueue, EpdSteady
from orchestrator.control.policies.orders import Fcfs, LeastSlack, ShortestFirst
from orchestrator.control.policies.partitioned import NexusSteps, SemiPdSteps
from orchestrator.control.policies.phase_sets import PhaseSets, PhaseSetsConfig
from orchestrator.control.policies.phasewise import (
    MARGIN,
    MOST_PREFILL_TOKENS,
    PhasewiseConfig,
    PredictedPlacing,
    PredictedSteps,
)
from orchestrator.control.policies.placing import LeastLoaded
from orchestrator.control.policies.policy import Order, Policy
from orchestrator.control.policies.sarathi import token_budget
from orchestrator.control.slo import Slo
from workers.api import Phase, PhaseSet
from workers.latency_model import LatencyModel
from workers.step_choice import Layout
from workers.step_cost import StepCost

FULL = frozenset(Phase)
E, P, D = (frozenset({phase}) for phase in Phase)
#: Sequences that a token budget is profiled beside.
PROFILED_DECODES = 64
#: Of a prompt in one step where only prompts run.
PREFILL_TOKENS = 4096
#: The strict budget of Sarathi-Serve.
STRICT_TOKENS = 512

MakeOrder = Callable[[], Order]


@dataclass(frozen=True, slots=True)
class Workload:
    """Means of a load."""

    prompt_tokens: float
    output_tokens: float
    num_tiles: float


@dataclass(frozen=True, slots=True)
class Setting:
    """What a policy is built for.

    split: phases of workers that have one each, for policies that are told them. placed: what `distserve_shape` found for the
    load. layouts: see PhasewiseConfig.
    """

    num_workers: int
    latency: LatencyModel
    slo: Slo
    load: Workload
    split: tuple[PhaseSet, ...]
    kv_token_s: float
    tile_s: float
    placed: tuple[PhaseSet, ...]
    layouts: tuple[Layout, ...] = ()

    @property
    def cost(self) -> StepCost:
        """Of a step."""
        return StepCost.of(self.latency)

    @property
    def full(self) -> tuple[PhaseSet, ...]:
        """Everything on every worker."""
        return (FULL,) * self.num_workers


def monolithic_prefill_first(setting: Setting, order: MakeOrder) -> Policy:
    """Prompts before decodes, on all workers."""
    return Policy(
        "monolithic_prefill_first", setting.full, order, LeastLoaded(), PrefillFirst(PREFILL_TOKENS)
    )


def sarathi(setting: Setting, order: MakeOrder) -> Policy:
    """Stall-free batches on all workers, with the budget that its profile gives for the target."""
    load = setting.load
    budget = token_budget(
        setting.latency.step_s,
        target_s=setting.slo.tpot_s,
        num_decodes=PROFILED_DECODES,
        context_tokens=round(load.prompt_tokens + load.output_tokens / 2),
        max_prompt_tokens=round(2 * load.prompt_tokens),
    )
    return Policy("sarathi", setting.full, order, LeastLoaded(), StallFree(budget or STRICT_TOKENS))


def sarathi_512(setting: Setting, order: MakeOrder) -> Policy:
    """The same with the paper's strict budget."""
    return Policy("sarathi_512", setting.full, order, LeastLoaded(), StallFree(STRICT_TOKENS))


def static_split(setting: Setting, order: MakeOrder) -> Policy:
    """One phase to a worker, as it was told."""
    return Policy("static_split", setting.split, order, LeastLoaded(), PrefillFirst(PREFILL_TOKENS))


def distserve(setting: Setting, order: MakeOrder) -> Policy:
    """The workers that its placement search gave each phase."""
    return Policy("distserve", setting.placed, order, LeastLoaded(), PrefillFirst(PREFILL_TOKENS))


def semi_pd(setting: Setting, order: MakeOrder) -> Policy:
    """Two streams on every worker, whose shares follow what was observed."""
    steps = SemiPdSteps(setting.cost, setting.slo)
    return Policy("semi_pd", setting.full, order, LeastLoaded(), steps, told=steps.told)


def nexus(setting: Setting, order: MakeOrder) -> Policy:
    """Two streams on every worker, whose shares follow what is predicted."""
    return Policy("nexus", setting.full, order, LeastLoaded(), NexusSteps(setting.latency))


def epd_queue(setting: Setting, order: MakeOrder) -> Policy:
    """One phase to a worker, which changes with the queues; pictures of one request on several workers."""
    steps = PrefillFirst(PREFILL_TOKENS)
    return Policy("epd_queue", setting.split, order, LeastLoaded(most_encoders=4), steps, EpdQueue().tick)


def epd_steady(setting: Setting, order: MakeOrder) -> Policy:
    """The same with the trigger that is ours."""
    steady = EpdSteady(setting.cost, tile_s=setting.tile_s, output_tokens=setting.load.output_tokens)
    steps = PrefillFirst(PREFILL_TOKENS)
    return Policy("epd_steady", setting.split, order, LeastLoaded(most_encoders=4), steps, steady.tick)


def mooncake(setting: Setting, order: MakeOrder) -> Policy:
    """Half of the workers prefill, and encode, the others decode; where, and who is refused, is the conductor's."""
    half = setting.num_workers // 2
    prefill = P | E if setting.load.num_tiles else P
    shape = (prefill,) * half + (D,) * (setting.num_workers - half)
    conductor = Conductor(
        setting.cost,
        setting.slo,
        kv_token_s=setting.kv_token_s,
        tile_s=setting.tile_s,
        decode_s=setting.load.output_tokens * setting.slo.tpot_s,
    )
    return Policy("mooncake", shape, order, conductor, PrefillFirst(PREFILL_TOKENS))


def phasewise(setting: Setting, order: MakeOrder) -> Policy:
    """All levers; workers may serve any phases, and begin with all."""
    return _phasewise("phasewise", setting, order, setting.full, (FULL, P | D, E | P, E, P, D))


def phasewise_apart(setting: Setting, order: MakeOrder) -> Policy:
    """The same where a worker can serve one phase at a time only, from the shape of static_split."""
    return _phasewise("phasewise_apart", setting, order, setting.split, (E, P, D))


def _phasewise(
    name: str, setting: Setting, order: MakeOrder, shape: tuple[PhaseSet, ...], allowed: tuple[PhaseSet, ...]
) -> Policy:
    cost = setting.cost
    config = PhasewiseConfig(setting.slo, cost, setting.tile_s, setting.kv_token_s, setting.layouts)
    sets = PhaseSets(PhaseSetsConfig(setting.slo, cost, setting.tile_s, allowed, floors=_floors(shape)))
    return Policy(name, shape, order, PredictedPlacing(config), PredictedSteps(config), sets.tick)


def _floors(shape: tuple[PhaseSet, ...]) -> dict[Phase, int]:
    """One worker of every phase that is there from the beginning."""
    return {phase: 1 for phase in Phase if any(phase in phases for phases in shape)}


POLICIES: dict[str, Callable[[Setting, MakeOrder], Policy]] = {
    one.__name__: one
    for one in (
        monolithic_prefill_first,
        sarathi,
        sarathi_512,
        static_split,
        distserve,
        semi_pd,
        nexus,
        epd_queue,
        epd_steady,
        mooncake,
        phasewise,
        phasewise_apart,
    )
}


def orders(cost: StepCost, slo: Slo) -> dict[str, MakeOrder]:
    """By name. The last one takes steps for those of phasewise."""
    return {
        "fcfs": Fcfs,
        "spf": ShortestFirst,
        "slack": lambda: LeastSlack(cost, MOST_PREFILL_TOKENS, MARGIN * slo.tpot_s),
    }
